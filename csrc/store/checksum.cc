#include "store/checksum.h"

#include <new>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

namespace torchshm::store {
namespace {

static_assert(sizeof(XXH3_state_t) == 576 && alignof(XXH3_state_t) == 64);

}  // namespace

uint64_t checksum(const std::byte* bytes, uint64_t count) { return XXH3_64bits(bytes, count); }

Checksum::Checksum() { (void)XXH3_64bits_reset(new (state_) XXH3_state_t); }

void Checksum::add(const std::byte* bytes, uint64_t count) {
  (void)XXH3_64bits_update(std::launder(reinterpret_cast<XXH3_state_t*>(state_)), bytes, count);
}

uint64_t Checksum::value() const {
  return XXH3_64bits_digest(std::launder(reinterpret_cast<const XXH3_state_t*>(state_)));
}

}  // namespace torchshm::store
