#include "base/status.h"

#include <cerrno>
#include <system_error>

namespace torchshm {

Status Status::system(const char* call, const std::string& on, int error) {
  std::string what = std::string(call) + "(" + on + "): " + std::generic_category().message(error);
  const bool memory = error == ENOMEM || error == ENOSPC;
  return Status(memory ? Code::kFull : Code::kSystem, std::move(what), error);
}

const std::string& Status::what() const {
  static const std::string none;
  return detail_ ? detail_->what : none;
}

}  // namespace torchshm
