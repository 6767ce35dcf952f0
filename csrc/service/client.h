// How a process becomes a client of a store: asks its service for the store's files, once.
//
// Private: what it returns. Shared: nothing of its own.
#pragma once

#include <memory>
#include <string>

#include "base/status.h"
#include "pool/member.h"
#include "service/wire.h"
#include "store/catalogue.h"

namespace torchshm::service {

struct Client {
  pool::Member* member = nullptr;  // one for each pool of the process, and for good
  std::shared_ptr<store::Catalogue> catalogue;
};

// Tries until `nanoseconds` have passed, as long as nobody serves the name. `go_on` is asked between tries (signals). kMissing when nobody
// came; kInvalid when the store is another user's or another version's.
Result<Client> connect(const std::string& name, uint64_t nanoseconds, bool (*go_on)());
// kMissing when nobody serves the name.
Result<Reply> ask(const std::string& name, Ask ask);

}  // namespace torchshm::service
