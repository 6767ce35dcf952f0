// A pool for a target's own blocks. Private to the fuzz targets.
#pragma once

#include <memory>

#include "pool/member.h"
#include "require.h"

namespace torchshm::fuzz {

inline std::unique_ptr<pool::Member> small_pool(uint64_t limit = uint64_t{16} << 20) {
  pool::Limits limits;
  limits.limit = limit;
  auto made = pool::Member::create(1, limits);
  REQUIRE(made.ok());
  return made.take();
}

}  // namespace torchshm::fuzz
