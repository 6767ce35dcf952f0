// The bytes of a value between its blocks and a spill file: in pieces, by this thread and, of large values, a second one, so that the
// checksum of one piece is computed while another is on its way to or from the disk.
//
// Whole pages of blocks that begin on a page go straight between their memory and the disk; everything else through a buffer.
// Private: the buffers, one of kPiece bytes per thread. A process that dies leaves a part of the file written, or of the blocks.
// Thread safety: any thread; the blocks are the caller's alone while it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/status.h"
#include "os/file.h"
#include "store/spill_format.h"

namespace torchshm::store::spill {

// The checksums of the pieces.
Result<std::vector<uint64_t>> write_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                                         const std::vector<const std::byte*>& blocks);

// kCorrupt when a piece has another checksum, or is not there; the blocks then hold anything.
Status read_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                 const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks);

}  // namespace torchshm::store::spill
