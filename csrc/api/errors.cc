#include "api/errors.h"

#include "os/futex.h"

namespace torchshm::api {

void fail(const Status& status) {
  const std::string why = "torchshm: " + status.what();
  switch (status.code()) {
    case Code::kFull:
      throw PoolFullError(why);
    case Code::kInvalid:
      throw std::invalid_argument(why);
    case Code::kExists:
      throw KeyExistsError(why);
    case Code::kMissing:
      throw StoreUnavailableError(why);
    default:
      throw Error(why);
  }
}

void fail_damaged(std::string_view key, const Status& status) {
  throw Error("torchshm: the entry of '" + std::string(key) + "' is damaged: " + status.what());
}

void fail_taken(std::string_view key) {
  throw KeyExistsError("torchshm: '" + std::string(key) +
                       "' is a name in this store already; save it under another one, or with overwrite");
}

void fail_kind(std::string_view key, const std::string& why) {
  throw TypeError("torchshm: '" + std::string(key) + "' can't be had in this form: " + why);
}

void check_key(std::string_view key) {
  if (key.empty() || key[0] == '\0')
    throw std::invalid_argument("torchshm: a key has at least one character, and does not begin with a zero byte");
}

uint64_t count_of(Nanoseconds time, const char* what) {
  if (time.count() < 0) throw std::invalid_argument(std::string("torchshm: ") + what + " is 0 or more");
  return static_cast<uint64_t>(time.count());
}

uint64_t time_after(uint64_t timeout) {
  const uint64_t now = os::boot_time();
  return timeout > UINT64_MAX - now ? UINT64_MAX : now + timeout;
}

std::string seconds(uint64_t ns) { return std::to_string(static_cast<double>(ns) * 1e-9) + " s"; }

}  // namespace torchshm::api
