// The whole control file as input: another member has written anything, anywhere, at any moment between two operations of ours.
//
// An input is a mode and then commands. In most modes commands change words of a busy pool's control file (sandbox.h), each table within easy
// reach, and operate on it, in any order. In the others the rest of the input is the file's beginning, all else zero, and a fixed round of
// operations follows. Whatever happens: no crash, no access outside the files, no loop that does not end. Data may be wrong.
#include <ctime>

#include <algorithm>
#include <filesystem>

#include "input.h"
#include "no_sleep.h"
#include "sandbox.h"
#if __has_include("pool/checker.h")
#include "pool/checker.h"
#endif

namespace torchshm::fuzz {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;

// Of processor time, in milliseconds: the machine may be busy with other things.
constexpr int64_t kMostPerOperation = 1000;
constexpr int64_t kEnough = 50;  // no further commands after that

int64_t processor_time() {
  timespec t{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

long threads() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
}

class Target {
 public:
  void one(Input input) {
    end_ = processor_time() + kEnough;
    const uint8_t mode = input.byte();
    if (mode % 16 != 1) {
      box_.restore();
      commands(input);
    } else {
      box_.clear();
      std::memcpy(box_.control(), input.rest(), std::min<uint64_t>(input.left(), box_.size()));
      const uint8_t round[] = {3, 0, 3, 200, 3, 133, 5,  0, 6, 0, 0, 6,  129, 1, 8, 0,  2,
                               9, 0, 1, 2,   3, 0,   11, 4, 0, 3, 8, 15, 12,  2, 0, 13, 14};
      commands(Input(round, sizeof round), false);
    }
    finish(mode >= 192);
  }

 private:
  const long threads_ = threads();
  struct Held {
    Member::View view;
    Mode mode;
  };

  uint64_t* word(uint64_t offset) const {
    return reinterpret_cast<uint64_t*>(box_.control() + offset % box_.size() / 8 * 8);
  }
  void change(Input& input, uint64_t offset) {
    auto* at = reinterpret_cast<std::atomic<uint64_t>*>(word(offset));
    at->store(input.value(at->load()));
  }

  void commands(Input input, bool changes = true) {
    const pool::Offsets at = pool::Offsets::of(Sandbox::kChunks);
    while (!input.empty()) {
      const uint8_t command = input.byte();
      if (changes) {
        switch (command % 32) {
          case 0:
          case 16:
            change(input, input.byte() % 17 * 8u);
            continue;
          case 1:
          case 17:
            change(input, at.leases + input.byte() % 8 * sizeof(pool::Lease) + input.byte() % 18 * 8u);
            continue;
          case 2:
            change(input, at.leases + input.take<uint16_t>() % pool::kMaxLeases * sizeof(pool::Lease) +
                              input.take<uint16_t>() % (sizeof(pool::Lease) / 8) * 8);
            continue;
          case 18:
          case 19:
            change(input, at.chunks + input.byte() % 32 * 8u);
            continue;
          case 20:
          case 21: {  // a block that there is, or any
            const uint8_t which = input.byte();
            const uint32_t page =
                which < 128 ? box_.handles()[which % box_.handles().size()].block : input.take<uint16_t>() % 8192u;
            change(input, at.blocks + page * sizeof(pool::Block) + input.byte() % 4 * 8u);
            continue;
          }
          case 22: {
            const uint8_t slot = input.byte();
            change(input, at.tickets + (slot % 4 * 1024u + input.byte() % 16) * sizeof(pool::Ticket) + slot / 128 * 8u);
            continue;
          }
          case 23:
            change(input, at.tickets + input.take<uint32_t>() % pool::kTickets * sizeof(pool::Ticket));
            continue;
          case 24:
            change(input, at.ledgers + input.byte() % 8 * at.ledger_stride + input.byte() % 128 * 8u);
            continue;
          case 25:
            change(input, input.take<uint32_t>());
            continue;
          case 26: {  // bytes
            const uint64_t offset = input.take<uint32_t>() % (box_.size() - 64);
            uint8_t bytes[64] = {};
            const size_t n = input.byte() % sizeof bytes + 1;
            input.copy(bytes, n);
            std::memcpy(box_.control() + offset, bytes, n);
            continue;
          }
          case 27:  // a word from elsewhere
            *word(input.take<uint32_t>()) = *word(input.take<uint32_t>());
            continue;
          case 28: {  // the same change to a whole table
            const uint64_t value = input.value(0);
            const uint8_t table = input.byte();
            if (table == 0xff) {  // every slot taken, by the dead
              for (uint32_t slot = 4; slot < pool::kMaxLeases; ++slot)
                *word(at.leases + slot * sizeof(pool::Lease)) = value | pool::kLeaseLive;
              continue;
            }
            for (uint32_t k = 0; k < 16; ++k) {
              if (table % 4 == 0) *word(at.chunks + k * 16 + table / 128 * 8u) = value;
              if (table % 4 == 1) *word(at.leases + k * sizeof(pool::Lease) + table / 4 % 18 * 8u) = value;
              if (table % 4 == 2) *word(at.ledgers + table / 4 % 8 * at.ledger_stride + k * 8u) = value;
              if (table % 4 == 3)
                *word(at.blocks + (table / 4 % 16 * 512 + k) * sizeof(pool::Block) + k % 2 * 8u) = value;
            }
            continue;
          }
          default:
            break;
        }
      }
      const int64_t start = processor_time();
      operate(command % 32 - 3, input);
      const int64_t now = processor_time();
      REQUIRE(now - start < kMostPerOperation);
      if (now > end_) return;
    }
  }

  void operate(int operation, Input& input) {
    if (!member_) {
      auto attached = box_.attach();
      if (!attached) {
        REQUIRE(!attached.status().what().empty());
        return;
      }
      member_ = attached.take();
    }
    switch (operation) {
      case 0: {
        static constexpr uint64_t kSizes[] = {1, 4096, 5000, 16384, 100000, 524288, 524289, 1 << 20, 3 << 20, 8 << 20};
        const uint8_t how = input.byte();
        const bool made = how >= 192;
        auto view = member_->allocate(kSizes[how % std::size(kSizes)], how >= 128, made);
        if (!view) break;
        REQUIRE(view->length >= kSizes[how % std::size(kSizes)]);
        touch(*view, true);
        if (made) {
          member_->release_made(view->block);
        } else {
          held_.push_back({*view, Mode::kReadWrite});
        }
        break;
      }
      case 1:
        release(input.byte());
        break;
      case 2: {
        if (held_.empty()) break;
        auto handle = member_->issue(held_[input.byte() % held_.size()].view.block);
        if (handle) issued_.push_back(*handle);
        break;
      }
      case 3: {
        const uint8_t which = input.byte();
        const auto& from = issued_.empty() || which >= 128 ? box_.handles() : issued_;
        redeem(from[which % from.size()], static_cast<Mode>(input.byte() % 3), which % 2 != 0);
        break;
      }
      case 4: {
        unsigned char bytes[Handle::kBytes] = {};
        input.copy(bytes, sizeof bytes);
        Handle handle = Handle::read(bytes);
        if (input.byte() % 8 != 0) handle.pool_id = member_->pool_id();
        redeem(handle, static_cast<Mode>(input.byte() % 3), false);
        break;
      }
      case 5: {
        if (held_.empty()) break;
        const Held& held = held_[input.byte() % held_.size()];
        const auto mode = static_cast<Mode>(input.byte() % 3);
        if (auto view = member_->view(held.view.block, mode)) {
          touch(*view, mode != Mode::kRead);
          held_.push_back({*view, mode});
        }
        break;
      }
      case 6: {
        const auto mode = static_cast<Mode>(input.byte() % 3);
        const uint64_t offset = input.take<uint32_t>() % Sandbox::kData;
        const std::byte* address = member_->arena().address(mode, offset);
        if (address == nullptr) break;
        if (const auto found = member_->find(address)) {
          REQUIRE(found->offset < found->length && found->length <= Sandbox::kData);
          if (found->mode == Mode::kCopyOnWrite)
            (void)member_->modified(*found, address - found->offset, address - found->offset + found->length);
        }
        break;
      }
      case 7:
        if (held_.empty()) break;
        held_.push_back(held_[input.byte() % held_.size()]);
        member_->retain(held_.back().view.block, held_.back().mode);
        break;
      case 8:
        (void)member_->reap();
        break;
      case 9:
        (void)member_->trim(input.value(0));
        break;
      case 10:
        (void)pool::summary(member_->stats());
        break;
      case 11:
        check();
        break;
      case 12:
        member_->prepare_fork();
        // A child has none of its parent's threads: where the janitor has one, this process can't play the child.
        if (input.byte() % 4 != 0 || threads() > threads_) {
          member_->parent_after_fork();
          break;
        }
        member_->child_after_fork();
        issued_.clear();
        break;
      case 26:  // leaves; the lease is dead then, but for the mapping
        leave();
        break;
      case 27:
        if (auto other = box_.attach()) (*other)->membership().abandon((*other)->arena());  // one comes and goes
        break;
      case 28:
        member_->set_ticket_age(0);
        break;
      default:
        break;
    }
  }

  void redeem(const Handle& handle, Mode mode, bool exclusive) {
    auto view = member_->redeem(handle, mode, exclusive);
    if (!view) {
      REQUIRE(!view.status().what().empty());
      return;
    }
    touch(*view, mode != Mode::kRead);
    held_.push_back({*view, mode});
  }

  // All that a view says may be read, and written. AddressSanitizer does not know mappings; the guard behind them does.
  void touch(const Member::View& view, bool write) {
    for (uint64_t at = 0; at < view.length; at += uint64_t{64} << 10) sum_ += static_cast<unsigned>(view.data[at]);
    sum_ += static_cast<unsigned>(view.data[view.length - 1]);
    if (write) view.data[0] = view.data[view.length - 1] = std::byte{1};
  }

  void release(uint8_t which) {
    if (held_.empty()) return;
    Held& held = held_[which % held_.size()];
    member_->release(held.view.block, held.mode);
    held = held_.back();
    held_.pop_back();
  }

  void check() {
    auto arena = box_.arena();
    if (!arena) return;
    (void)pool::collect(*arena);
#if __has_include("pool/checker.h")
    const pool::CheckReport report = pool::check(*arena, {});
    REQUIRE(report.ok() || !report.first().empty());
#endif
  }

  void leave() {
    for (; !held_.empty(); release(0)) {
    }
    issued_.clear();
    member_->membership().abandon(member_->arena());
    member_.reset();
  }

  void finish(bool checked) {
    if (member_) {
      (void)member_->reap();
      (void)member_->trim(0);
      leave();
    }
    if (checked) check();
  }

  Sandbox box_;
  std::unique_ptr<Member> member_;
  std::vector<Held> held_;
  std::vector<Handle> issued_;
  unsigned sum_ = 0;
  int64_t end_ = 0;
};

}  // namespace
}  // namespace torchshm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* target = new torchshm::fuzz::Target;
  target->one(torchshm::fuzz::Input(data, size));
  return 0;
}
