// The memory of what a name stands for, as the caller asks to see it.
//
// Private to the process. Who has a Memory holds its block, by one hold or in a copy of its own.
// Thread safety: an Opener by one thread; a Memory from any.
#pragma once

#include <memory>
#include <vector>

#include "api/values.h"
#include "pool/member.h"
#include "store/catalogue.h"

namespace torchshm::api {

// Memory that is kept valid by its owner.
struct Memory {
  std::byte* data = nullptr;
  uint64_t length = 0;
  bool writeable = false;
  std::shared_ptr<void> owner;
};

// Takes over one hold of the view's block.
std::shared_ptr<void> owner_of(pool::Member* member, const pool::Member::View& view, pool::Mode mode);

// The blocks of one value, each opened once: views that share memory share it afterwards.
class Opener {
 public:
  Opener(pool::Member* member, const store::Entry& entry, Mode mode)
      : member_(member), entry_(entry), mode_(mode), opened_(entry.blocks.size()) {}

  // The bytes that the leaf touches, at its first element.
  Result<Memory> open(const Leaf& leaf);
  Result<Array> array(const Leaf& leaf);

 private:
  pool::Member* member_;
  const store::Entry& entry_;
  Mode mode_;
  std::vector<Memory> opened_;
};

}  // namespace torchshm::api
