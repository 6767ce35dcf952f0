// What a client and a store's service say to each other: one request, one reply. The data path needs neither.
//
// Values only. Both ends check every field of what they receive.
#pragma once

#include <cstdint>

namespace torchshm::service {

constexpr uint64_t kMagic = 0x3130565253485254;  // "TRHSRV01"

enum class Ask : uint32_t {
  kAttach = 1,  // answered with the data, control and catalogue files
  kInfo = 2,
  kStop = 3,
};

struct Request {
  uint64_t magic = kMagic;
  Ask ask = Ask::kAttach;
  uint32_t reserved = 0;
};

enum class Answer : uint32_t { kOk = 0, kRefused = 1, kUnknown = 2 };

struct Reply {
  uint64_t magic = kMagic;
  Answer answer = Answer::kOk;
  uint32_t pid = 0;  // of the service
  uint64_t pool_id = 0;
  uint64_t clients = 0;  // attached through this service, and alive
  uint64_t started = 0;  // CLOCK_REALTIME, ns
  char why[88] = {};     // zero-terminated
};

static_assert(sizeof(Request) == 16 && sizeof(Reply) == 128);

}  // namespace torchshm::service
