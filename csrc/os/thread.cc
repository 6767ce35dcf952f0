#include "os/thread.h"

#include <csignal>
#include <exception>
#include <utility>

namespace torchshm::os {

Result<std::thread> start_thread(std::function<void()> work) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  Result<std::thread> started = Status(Code::kUnsupported, "no thread");
  try {
    started = std::thread(std::move(work));
  } catch (const std::exception& error) {
    started = Status(Code::kUnsupported, std::string("no thread is to be had: ") + error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

}  // namespace torchshm::os
