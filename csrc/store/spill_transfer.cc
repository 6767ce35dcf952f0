#include "store/spill_transfer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "base/failpoint.h"
#include "os/thread.h"
#include "store/checksum.h"

namespace torchshm::store::spill {
namespace {

// With less, starting a thread costs about what it gains. Tried: 4, 8, 16 MiB.
constexpr uint64_t kTwoFrom = uint64_t{8} << 20;
// One call for so much: as much as dd is commonly told. 2 MiB was slower beside others that write to the file system's journal.
constexpr uint64_t kAtOnce = uint64_t{16} << 20;
// The same for each of two threads that read past the page cache: a disk that is far away has as much under way as it takes. Towards the end
// less, this part of what is left: what is checked after the last read the disk waits for, 0.7 ms of 16 MiB with halves, 0.2 with thirds.
constexpr uint64_t kReadAtOnce = uint64_t{8} << 20, kOfTheRest = 3;
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
  std::vector<Part> bytes;  // of blocks, straight or not; between them are zeros
};

class Blocks {
 public:
  Blocks(const Shape& shape, const std::vector<uint64_t>& lengths, std::vector<std::byte*> memory)
      : shape_(shape), lengths_(lengths), memory_(std::move(memory)) {}

  void plan(uint64_t begin, uint64_t end, Plan* plan) const {
    plan->runs.clear();
    plan->parts.clear();
    plan->bytes.clear();
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
      plan->bytes.push_back({from, to, memory});
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

Status no_memory() { return Status(Code::kFull, "no memory to read or write a file with", ENOMEM); }

struct Joined {
  std::thread thread;
  ~Joined() {
    if (thread.joinable()) thread.join();
  }
};

// Gives pieces to the threads until there are none left, or one has failed.
class Work {
 public:
  // alone: in one thread, one after the other. at_once: pieces, at most.
  Work(const Shape& shape, bool alone, uint64_t at_once) : shape_(shape), alone_(alone), at_once_(at_once) {}

  // one(first piece, begin, plan, buffer); from any of the threads.
  template <class One>
  Status run(const Blocks& blocks, const One& one) {
    const auto all = [&] { all_pieces(blocks, one); };
    {
      Joined other;
      if (!alone_ && shape_.file_bytes - shape_.head_bytes >= kTwoFrom) {
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
    // Relaxed, as in take(): it only deals out numbers; what the pieces hold is published by the join.
    for (uint64_t piece, end_piece; !failed_.load(std::memory_order_relaxed) && take(&piece, &end_piece);) {
      const uint64_t begin = shape_.head_bytes + piece * kPiece;
      const uint64_t end = std::min(shape_.head_bytes + end_piece * kPiece, shape_.file_bytes);
      blocks.plan(begin, end, &plan);
      Status status;
      const bool buffered = std::any_of(plan.runs.begin(), plan.runs.end(), [](const Run& run) { return !run.memory; });
      if (buffered && !buffer) {
        buffer = Buffer(at_once_ * kPiece);
        if (!buffer) status = no_memory();
      }
      if (status.ok()) status = one(piece, begin, plan, buffer.data());
      if (!status.ok()) fail(std::move(status));
    }
  }

  // The next pieces, [from, to); false when there are none.
  bool take(uint64_t* from, uint64_t* to) {
    *from = next_.load(std::memory_order_relaxed);
    do {
      if (*from == shape_.pieces) return false;
      *to = *from + std::clamp<uint64_t>((shape_.pieces - *from) / kOfTheRest, 1, at_once_);
    } while (!next_.compare_exchange_weak(*from, *to, std::memory_order_relaxed));
    return true;
  }

  void fail(Status status) {
    const std::lock_guard lock(mutex_);
    if (!failed_.exchange(true)) failure_ = std::move(status);
  }

  const Shape& shape_;
  const bool alone_;
  const uint64_t at_once_;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;  // failure_
  Status failure_;
};

// As one piece is read.
uint64_t checksum_of(const Plan& plan, uint64_t begin, uint64_t end) {
  static constexpr std::byte kZeros[kPage] = {};
  Checksum sum;
  const auto gap = [&](uint64_t from, uint64_t to) {
    for (; from < to; from += std::min(kPage, to - from)) sum.add(kZeros, std::min(kPage, to - from));
  };
  for (const Part& part : plan.bytes) {
    gap(begin, part.begin);
    sum.add(part.memory, part.end - part.begin);
    begin = part.end;
  }
  gap(begin, end);
  return sum.value();
}

class Writer {
 public:
  Writer(os::File& file, const SpillHead& head, const Shape& shape, std::vector<std::byte*> memory)
      : file_(file),
        head_(head),
        shape_(shape),
        blocks_(shape, head.lengths, std::move(memory)),
        checksums_(shape.pieces) {}

  // Of one piece, everything in one call.
  Status alone() {
    compute();
    std::vector<os::File::Span> spans;
    if (shape_.pieces == 1) {
      Plan plan;
      blocks_.plan(shape_.head_bytes, shape_.file_bytes, &plan);
      if (!fill(plan, shape_.head_bytes)) return no_memory();
      for (const Run& run : plan.runs) spans.push_back({from(run, shape_.head_bytes), run.end - run.begin});
    } else {
      auto written = write_pieces();
      if (!written.ok()) return written;
    }
    return write_head(std::move(spans));
  }

  // The checksums come from another thread, or where there is none, afterwards.
  Status beside_checksums() {
    Status written;
    bool computed = false;
    {
      Joined other;
      auto started = os::start_thread([this] { compute(); });
      if (started) {
        other.thread = started.take();
        computed = true;
      }
      written = write_pieces();
      if (!written.ok()) stop_.store(true, std::memory_order_relaxed);
    }
    if (!written.ok()) return written;
    if (!computed) compute();
    return write_head({});
  }

 private:
  void compute() {
    Plan plan;
    for (uint64_t piece = 0; piece < shape_.pieces && !stop_.load(std::memory_order_relaxed); ++piece) {
      const uint64_t begin = shape_.head_bytes + piece * kPiece, end = std::min(begin + kPiece, shape_.file_bytes);
      blocks_.plan(begin, end, &plan);
      checksums_[piece] = checksum_of(plan, begin, end);
    }
  }

  // What the plan does not take straight from memory; false when there is no memory for it.
  bool fill(const Plan& plan, uint64_t begin) {
    for (const Run& run : plan.runs) {
      if (run.memory != nullptr) continue;
      if (!buffer_) buffer_ = Buffer(kPiece);
      if (!buffer_) return false;
      std::memset(buffer_.data() + (run.begin - begin), 0, run.end - run.begin);
    }
    for (const Part& part : plan.parts)
      std::memcpy(buffer_.data() + (part.begin - begin), part.memory, part.end - part.begin);
    return true;
  }

  const std::byte* from(const Run& run, uint64_t begin) const {
    return run.memory != nullptr ? run.memory : buffer_.data() + (run.begin - begin);
  }

  // Straight runs that continue one another in memory go in one call: fewer transactions of the file system.
  Status write_pieces() {
    Plan plan;
    Run open{0, 0, nullptr};
    const auto write = [&](const std::byte* bytes, const Run& run) {
      return file_.write_at(bytes, run.end - run.begin, run.begin);
    };
    for (uint64_t begin = shape_.head_bytes; begin < shape_.file_bytes; begin += kPiece) {
      blocks_.plan(begin, std::min(begin + kPiece, shape_.file_bytes), &plan);
      if (!fill(plan, begin)) return no_memory();
      for (const Run& run : plan.runs) {
        if (open.memory != nullptr && run.memory == open.memory + (run.begin - open.begin) &&
            run.end - open.begin <= kAtOnce) {
          open.end = run.end;
          continue;
        }
        Status written = open.memory != nullptr ? write(open.memory, open) : Status();
        open = run;
        if (written.ok() && run.memory == nullptr) written = write(from(run, begin), run);
        if (!written.ok()) return written;
      }
    }
    return open.memory != nullptr ? write(open.memory, open) : Status();
  }

  Status write_head(std::vector<os::File::Span> then) {
    TORCHSHM_POINT("spill.checksums_known");
    auto first = encode(head_, shape_, checksums_);
    if (!first) return std::move(first.status());
    then.insert(then.begin(), {first->data(), shape_.head_bytes});
    return file_.write_all(then, 0);
  }

  os::File& file_;
  const SpillHead& head_;
  const Shape& shape_;
  const Blocks blocks_;
  std::vector<uint64_t> checksums_;
  std::atomic<bool> stop_{false};  // relaxed: only to save work
  Buffer buffer_;
};

}  // namespace

Status write_value(os::File& file, const SpillHead& head, const Shape& shape,
                   const std::vector<const std::byte*>& blocks) {
  std::vector<std::byte*> memory;  // only read
  memory.reserve(blocks.size());
  for (const std::byte* block : blocks) memory.push_back(const_cast<std::byte*>(block));
  Writer writer(file, head, shape, std::move(memory));
  return shape.file_bytes - shape.head_bytes < kTwoFrom ? writer.alone() : writer.beside_checksums();
}

Status read_body(os::File& file, const Shape& shape, const std::vector<uint64_t>& lengths,
                 const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks) {
  const Blocks into(shape, lengths, blocks);
  // Through the page cache the kernel reads ahead of one who goes through the file in order, and two are in each other's way.
  Work work(shape, !file.direct(), file.direct() ? kReadAtOnce / kPiece : 1);
  return work.run(into, [&](uint64_t piece, uint64_t begin, const Plan& plan, std::byte* buffer) -> Status {
    const auto bytes_of = [&](const Run& run) {
      return run.memory != nullptr ? run.memory : buffer + (run.begin - begin);
    };
    for (const Run& run : plan.runs) {
      auto read = file.read_at(bytes_of(run), run.end - run.begin, run.begin);
      if (!read.ok()) return read;
    }
    Checksum sum;
    uint64_t from = begin, to = std::min(from + kPiece, shape.file_bytes);  // of the piece
    for (const Run& run : plan.runs) {
      for (uint64_t at = run.begin; at < run.end;) {
        const uint64_t length = std::min(run.end, to) - at;
        sum.add(bytes_of(run) + (at - run.begin), length);
        at += length;
        if (at < to) continue;
        if (sum.value() != checksums[piece]) {
          return Status(Code::kCorrupt, file.path() + " is damaged between its bytes " + std::to_string(from) +
                                            " and " + std::to_string(to));
        }
        sum = Checksum();
        ++piece;
        from = to;
        to = std::min(from + kPiece, shape.file_bytes);
      }
    }
    for (const Part& part : plan.parts) std::memcpy(part.memory, buffer + (part.begin - begin), part.end - part.begin);
    return {};
  });
}

bool copy_body(const std::byte* file, const Shape& shape, const std::vector<uint64_t>& lengths,
               const std::vector<uint64_t>& checksums, const std::vector<std::byte*>& blocks) {
  if (shape.pieces == 1 && checksum(file + shape.head_bytes, shape.file_bytes - shape.head_bytes) != checksums.front())
    return false;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (lengths[i] != 0) std::memcpy(blocks[i], file + shape.offsets[i], lengths[i]);
  }
  return true;
}

}  // namespace torchshm::store::spill
