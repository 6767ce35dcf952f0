// What the C++ API throws, and when arguments are in order.
//
// Private to the process. Thread safety: plain functions.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "torchshm/store.h"

namespace torchshm::api {

[[noreturn]] void fail(const Status& status);
[[noreturn]] void fail_damaged(std::string_view key, const Status& status);
[[noreturn]] void fail_taken(std::string_view key);
[[noreturn]] void fail_kind(std::string_view key, const std::string& why);

// Throws unless it is a name that a user may give.
void check_key(std::string_view key);
// In nanoseconds; throws when it is negative.
uint64_t count_of(Nanoseconds time, const char* what);
// By CLOCK_BOOTTIME.
uint64_t time_after(uint64_t timeout);
// "1.500000 s"
std::string seconds(uint64_t ns);

}  // namespace torchshm::api
