// Any 32 bytes as a handle, against a pool with blocks of every kind: redeem() gives the block that the handle names, with its own bytes, or a Status.
//
// An input is one or more of: a selector, then a handle. The selector says which handle the 32 bytes are laid over (xor) and the mode.
#include <memory>
#include <vector>

#include "input.h"
#include "os/memfd.h"
#include "pool/handle.h"
#include "pool/member.h"
#include "small_pool.h"
#if __has_include("pool/checker.h")
#include "pool/checker.h"
#endif

namespace torchshm::fuzz {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;

class Target {
 public:
  Target() {
    sender_ = small_pool();
    auto made = Member::attach(os::duplicate(sender_->arena().data_fd()).take(),
                               os::duplicate(sender_->arena().control_fd()).take());
    REQUIRE(made.ok());
    receiver_ = made.take();
    for (const uint64_t bytes : {uint64_t{100}, uint64_t{5000}, uint64_t{65536}, uint64_t{500000}, uint64_t{1} << 20,
                                 uint64_t{5} << 20, uint64_t{4097}, uint64_t{4096}}) {
      auto block = sender_->allocate(bytes, bytes % 4096 == 0);
      REQUIRE(block.ok());
      const auto mark = static_cast<unsigned char>(blocks_.size() + 1);
      std::memset(block->data, mark, block->length);
      blocks_.push_back({block->block, block->length, mark, issue(block->block)});
    }
    // Blocks that were there, and whose places are used again or free.
    for (int i = 0; i < 4; ++i) {
      auto block = sender_->allocate(i % 2 == 0 ? 4096 : uint64_t{3} << 20, true);
      REQUIRE(block.ok());
      stale_.push_back(issue(block->block));
      auto view = receiver_->redeem(stale_.back(), Mode::kReadWrite);
      REQUIRE(view.ok());
      receiver_->release(block->block, Mode::kReadWrite);
      sender_->release(block->block, Mode::kReadWrite);
    }
  }

  void one(Input& input) {
    const uint8_t selector = input.byte();
    const size_t n = blocks_.size() + stale_.size();
    const size_t which = selector / 4 % (n + 1);
    Handle over{};
    if (which < blocks_.size()) {
      over = blocks_[which].handle;
    } else if (which < n) {
      over = stale_[which - blocks_.size()];
    }
    unsigned char bytes[Handle::kBytes], mask[Handle::kBytes] = {};
    over.write(bytes);
    input.copy(mask, sizeof mask);
    for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] ^= mask[i];
    redeem(Handle::read(bytes), static_cast<Mode>(selector % 4 % 3), selector % 4 == 3);
    if (++done_ % (1u << 18) == 0) check();
  }

 private:
  struct Known {
    uint32_t block;
    uint64_t length;
    unsigned char mark;
    Handle handle;
  };

  Handle issue(uint32_t block) {
    auto handle = sender_->issue(block);
    REQUIRE(handle.ok());
    return *handle;
  }

  void redeem(const Handle& handle, Mode mode, bool exclusive) {
    auto view = receiver_->redeem(handle, mode, exclusive);
    Known* named = nullptr;
    for (Known& known : blocks_) {
      if (known.block == handle.block && known.handle.generation == handle.generation) named = &known;
    }
    const bool ours = handle.pool_id == sender_->pool_id();
    if (!view) {
      const Code code = view.code();
      REQUIRE(!view.status().what().empty());
      if (!ours) {
        REQUIRE(code == Code::kForeign);
      } else if (handle.ticket >= pool::kTickets || handle.block >= receiver_->arena().pages()) {
        REQUIRE(code == Code::kInvalid);
      } else if (named != nullptr) {
        REQUIRE(code == Code::kUnsupported && mode == Mode::kCopyOnWrite);
      } else {
        REQUIRE(code == Code::kStale);
      }
      return;
    }
    REQUIRE(ours && named != nullptr && view->block == named->block && view->length == named->length);
    REQUIRE(static_cast<unsigned char>(view->data[0]) == named->mark);
    REQUIRE(static_cast<unsigned char>(view->data[view->length - 1]) == named->mark);
    receiver_->release(view->block, mode);
    // The ticket that goes with the block's handle may be used up now, and only that one.
    if (handle.ticket == named->handle.ticket && handle.nonce == named->handle.nonce)
      named->handle = issue(named->block);
  }

  void check() {
    const pool::Stats stats = sender_->stats();
    REQUIRE(stats.blocks == blocks_.size());
    REQUIRE(stats.tickets == blocks_.size());
    REQUIRE(stats.leases.size() == 2);
    for (const pool::LeaseStats& lease : stats.leases)
      REQUIRE(lease.held_blocks == (lease.slot == sender_->membership().slot() ? blocks_.size() : 0));
#if __has_include("pool/checker.h")
    pool::CheckOptions options;
    options.at_rest = true;
    const pool::CheckReport report = pool::check(sender_->arena(), options);
    if (!report.ok()) std::fprintf(stderr, "%s\n", report.first().c_str());
    REQUIRE(report.ok());
#endif
  }

  std::unique_ptr<Member> sender_, receiver_;
  std::vector<Known> blocks_;
  std::vector<Handle> stale_;
  uint64_t done_ = 0;
};

}  // namespace
}  // namespace torchshm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* target = new torchshm::fuzz::Target;
  torchshm::fuzz::Input input(data, size);
  do {
    target->one(input);
  } while (!input.empty());
  return 0;
}
