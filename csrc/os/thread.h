// A thread of the pool's own: it takes no signal of the program's.
//
// Private: all of it. A forked child has no such thread.
// Thread safety: any thread.
#pragma once

#include <functional>
#include <thread>

#include "base/status.h"

namespace torchshm::os {

// kUnsupported when the system gives no further thread.
Result<std::thread> start_thread(std::function<void()> work);

}  // namespace torchshm::os
