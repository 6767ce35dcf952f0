// Errors as values. A Status is either ok or says what failed, in which system call, and with which errno.
//
// Who may call it: everyone; the room base uses nothing else. When a process dies here: nothing is shared.
#pragma once

#include <cerrno>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>

namespace torchshm {

enum class Code : uint8_t {
  kOk,
  kFull,         // the pool's limit, or the system's memory, is reached
  kStale,        // the handle's block has been released since
  kInvalid,      // the handle or the argument is not one we made
  kForeign,      // the handle belongs to a pool that this process is no member of
  kNoSlot,       // every lease is taken
  kCorrupt,      // the control file contradicts itself
  kUnsupported,  // the kernel or the limits of the process do not allow a pool
  kSystem,       // a system call failed
  kExists,       // the name is taken
  kMissing,      // there is no such name
  kBusy,         // somebody else is at it: look again
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string what, int error = 0)
      : detail_(std::make_unique<Detail>(Detail{code, error, std::move(what)})) {}

  static Status system(const char* call, const std::string& on, int error);

  bool ok() const { return detail_ == nullptr; }
  explicit operator bool() const { return ok(); }
  Code code() const { return detail_ ? detail_->code : Code::kOk; }
  int error() const { return detail_ ? detail_->error : 0; }
  // kFull, whatever goes: more was asked for than there can ever be.
  bool too_large() const { return code() == Code::kFull && error() == EFBIG; }
  const std::string& what() const;

 private:
  struct Detail {
    Code code;
    int error;
    std::string what;
  };
  std::unique_ptr<Detail> detail_;
};

// A value or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::move(value)) {}
  Result(Status status) : held_(std::move(status)) {}

  bool ok() const { return held_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& operator*() { return std::get<0>(held_); }
  const T& operator*() const { return std::get<0>(held_); }
  T* operator->() { return &std::get<0>(held_); }
  T take() { return std::move(std::get<0>(held_)); }
  // REQUIRES: !ok()
  Status& status() { return std::get<1>(held_); }
  const Status& status() const { return std::get<1>(held_); }
  Code code() const { return ok() ? Code::kOk : status().code(); }

 private:
  std::variant<T, Status> held_;
};

}  // namespace torchshm
