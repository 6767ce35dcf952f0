// Figures about a pool, read without locks: each is exact for some moment during the call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pool/arena.h"

namespace torchshm::pool {

struct LeaseStats {
  uint32_t slot = 0, pid = 0;
  std::string name;
  uint64_t held_blocks = 0, held_bytes = 0;
  uint64_t allocations = 0, fallbacks = 0, grown_bytes = 0;
};

struct Stats {
  uint64_t limit = 0, warm_limit = 0;
  uint64_t committed = 0;  // bytes with pages behind them
  uint64_t live = 0;       // bytes of live blocks
  uint64_t warm = 0;       // bytes of idle chunks
  uint64_t blocks = 0;
  uint64_t tickets = 0, named = 0;  // that are out: with messages and queues, and with names
  uint64_t ticket_bytes = 0;        // of live blocks that messages on their way keep, whoever else does
  uint64_t reaped = 0, taken_back = 0;
  uint64_t control = 0;  // bytes of the control file in use by live blocks' descriptors and tables
  std::vector<LeaseStats> leases;
};

Stats collect(const Arena& arena);

// Who the members say they are.
struct Signature {
  uint32_t pid = 0;
  std::string name;
};
std::vector<Signature> signatures(const Arena& arena);

// "3 blocks, 1.2 GB, held by pid 12 (python) 1.0 GB, ...": for PoolFullError.
std::string summary(const Stats& stats);

}  // namespace torchshm::pool
