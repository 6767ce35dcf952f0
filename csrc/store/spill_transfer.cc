#include "store/spill_transfer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "os/thread.h"
#include "store/checksum.h"

namespace torchshm::store::spill {
namespace {

// With less, starting a thread costs about what it gains. Tried: 4, 8, 16 MiB.
constexpr uint64_t kTwoFrom = uint64_t{8} << 20;
// Below it a copy is cheaper than a transfer of its own.
constexpr uint64_t kStraightFrom = uint64_t{64} << 10;

// [begin, end) of the file. Straight from or into memory, or else through the buffer, at the place that it has in its piece.
struct Run {
  uint64_t begin, end;
  std::byte* memory;
};

// A part of a block that lies in the buffer.
struct Part {
  uint64_t begin, end;
  std::byte* memory;
};

struct Plan {
  std::vector<Run> runs;  // one after the other, all of the piece
  std::vector<Part> parts;
};

class Blocks {
 public:
  Blocks(const Shape& shape, const std::vector<uint64_t>& lengths, std::vector<std::byte*> memory)
      : shape_(shape), lengths_(lengths), memory_(std::move(memory)) {}

  void plan(uint64_t begin, uint64_t end, Plan* plan) const {
    plan->runs.clear();
    plan->parts.clear();
    const auto add = [&](uint64_t from, uint64_t to, std::byte* memory) {
      if (from < to) plan->runs.push_back({from, to, memory});
    };
    uint64_t done = begin;
    const auto& offsets = shape_.offsets;
    // The last block that begins at or before the piece, then the others.
    auto at = std::upper_bound(offsets.begin(), offsets.end(), begin);
    size_t i = static_cast<size_t>(at - offsets.begin());
    if (i > 0) --i;
    for (; i < offsets.size() && offsets[i] < end; ++i) {
      const uint64_t from = std::max(offsets[i], begin), to = std::min(offsets[i] + lengths_[i], end);
      if (from >= to) continue;
      std::byte* memory = memory_[i] + (from - offsets[i]);
      const bool on_page = from % kPage == 0 && reinterpret_cast<uintptr_t>(memory) % kPage == 0;
      const uint64_t straight = on_page && to - from >= kStraightFrom ? (to - from) / kPage * kPage : 0;
      if (straight != 0) {
        add(done, from, nullptr);
        add(from, from + straight, memory);
        done = from + straight;
      }
      if (from + straight < to) plan->parts.push_back({from + straight, to, memory + straight});
    }
    add(done, end, nullptr);
  }

 private:
  const Shape& shape_;
  const std::vector<uint64_t>& lengths_;
  const std::vector<std::byte*> memory_;
};

struct Joined {
  std::thread thread;
  ~Joined() {
    if (thread.joinable()) thread.join();
  }
};

// Gives pieces to the threads until there are none left, or one has failed.
class Work {
 public:
  explicit Work(const Shape& shape) : shape_(shape) {}

  // one(piece, begin, end, plan, buffer); from any of the threads.
  template <class One>
  Status run(const Blocks& blocks, const One& one) {
    const auto all = [&] { all_pieces(blocks, one); };
    {
      Joined other;
      if (shape_.file_bytes - shape_.head_bytes >= kTwoFrom) {
        auto started = os::start_thread(all);
        if (started) other.thread = started.take();  // else this one does it alone
      }
      all();
    }
    const std::lock_guard lock(mutex_);
    return std::move(failure_);
  }

 private:
  template <class One>
  void all_pieces(const Blocks& blocks, const One& one) {
    Buffer buffer;
    Plan plan;
    // Relaxed: it only deals out numbers; what the pieces hold is published by the join.
    for (uint64_t piece; !failed_.load(std::memory_order_relaxed) &&
                         (piece = next_.fetch_add(1, std::memory_order_relaxed)) < shape_.pieces;) {
      const uint64_t begin = shape_.head_bytes + piece * kPiece, end = std::min(begin + kPiece, shape_.file_bytes);
      blocks.plan(begin, end, &plan);
      Status status;
      const bool buffered = std::any_of(plan.runs.begin(), plan.runs.end(), [](const Run& run) { return !run.memory; });
      if (buffered && !buffer) {
        buffer = Buffer(kPiece);
        if (!buffer) status = Status(Code::kFull, "no memory to read or write a file with", ENOMEM);
      }
      if (status.ok()) status = one(piece, begin, plan, buffer.data());
      if (!status.ok()) fail(std::move(status));
    }
  }

  void fail(Status status) {
    const std::lock_guard lock(mutex_);
    if (!failed_.exchange(true)) failure_ = std::move(status);
  }

  const Shape& shape_;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;  // failure_
  Status failure_;
};

}  // namespace

Result<std::vector<uint64_t>> write_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                                         const std::vector<const std::byte*>& blocks) {
  std::vector<std::byte*> memory;  // only read
  memory.reserve(blocks.size());
  for (const std::byte* block : blocks) memory.push_back(const_cast<std::byte*>(block));
  std::vector<uint64_t> checksums(shape.pieces);
  const Blocks from(shape, lengths, std::move(memory));
  Work work(shape);
  auto status = work.run(from, [&](uint64_t piece, uint64_t begin, const Plan& plan, std::byte* buffer) -> Status {
    for (const Run& run : plan.runs) {
      if (run.memory == nullptr) std::memset(buffer + (run.begin - begin), 0, run.end - run.begin);
    }
    for (const Part& part : plan.parts) std::memcpy(buffer + (part.begin - begin), part.memory, part.end - part.begin);
    Checksum sum;
    for (const Run& run : plan.runs) {
      const std::byte* bytes = run.memory != nullptr ? run.memory : buffer + (run.begin - begin);
      sum.add(bytes, run.end - run.begin);
      auto written = file.write_at(bytes, run.end - run.begin, run.begin);
      if (!written.ok()) return written;
    }
    checksums[piece] = sum.value();
    return {};
  });
  if (!status.ok()) return status;
  return checksums;
}

Status read_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                 const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks) {
  const Blocks into(shape, lengths, blocks);
  Work work(shape);
  return work.run(into, [&](uint64_t piece, uint64_t begin, const Plan& plan, std::byte* buffer) -> Status {
    Checksum sum;
    for (const Run& run : plan.runs) {
      std::byte* bytes = run.memory != nullptr ? run.memory : buffer + (run.begin - begin);
      auto read = file.read_at(bytes, run.end - run.begin, run.begin);
      if (!read.ok()) return read;
      sum.add(bytes, run.end - run.begin);
    }
    if (sum.value() != checksums[piece]) {
      return Status(Code::kCorrupt, file.path() + " is damaged between its bytes " + std::to_string(begin) + " and " +
                                        std::to_string(std::min(begin + kPiece, shape.file_bytes)));
    }
    for (const Part& part : plan.parts) std::memcpy(part.memory, buffer + (part.begin - begin), part.end - part.begin);
    return {};
  });
}

}  // namespace torchshm::store::spill
