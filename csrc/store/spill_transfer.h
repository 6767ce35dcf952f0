// The bytes of a value between its blocks and a spill file. Of large values the checksums come from a second thread: beside the one that
// writes, since the two have nothing to wait for from each other; when reading past the page cache, each of the two reads pieces and checks
// them, so that one is checked while another is on its way from the disk. Through the page cache the kernel reads ahead instead.
//
// Whole pages of blocks that begin on a page go straight between their memory and the disk; everything else through a buffer.
// Private: the buffers, one per thread, of the pieces that it reads or writes at once. A process that dies leaves a part of the file
// written, or of the blocks.
// Thread safety: any thread; the blocks are the caller's alone while it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/status.h"
#include "os/file.h"
#include "store/spill_format.h"

namespace torchshm::store::spill {

// The body, and then the head with its checksums: a file is nothing without it. Of one piece, both at once.
// REQUIRES: shape is that of head; the file is new.
Status write_value(os::File& file, const SpillHead& head, const Shape& shape,
                   const std::vector<const std::byte*>& blocks);

// kCorrupt when a piece has another checksum, or is not there; the blocks then hold anything.
Status read_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                 const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks);

// The same from a file of one piece that is in memory. False: another checksum.
bool copy_body(const std::byte* file, const Shape& shape, const std::vector<uint64_t>& lengths,
               const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks);

}  // namespace torchshm::store::spill
