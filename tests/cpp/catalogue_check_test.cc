// The catalogue's checker: it finds each kind of damage, names it, and finds nothing in a sound store, whatever its clients are doing.
//
// TORCHSHM_SOAK_SECONDS sets how long clients work under it (default 4), TORCHSHM_SOAK_SEED which sequence.
#include "store/catalogue_check.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <functional>
#include <random>
#include <vector>

#include "base/failpoint.h"
#include "crowd_at_work.h"
#include "os/mapping.h"
#include "os/process.h"
#include "pool/members.h"
#include "store/body.h"
#include "store/key.h"
#include "stores.h"

namespace torchshm::tests {
namespace {

using pool::Arena;
using pool::Mode;
using pool::Pair;
using pool::TicketValue;
using store::Body;
using store::CatalogueReport;
using store::CellState;
using store::CellValue;
using store::SlotState;
using store::SlotValue;
using store::StandingValue;

// ---- damage

// A store with something of everything: names of one block, of three, with a long key, a bound one and a mark; one that was removed.
struct Scene {
  Scene() : store(fresh_store(uint64_t{64} << 20)), other(join(store)) {
    EXPECT_TRUE(save_filled(store, "small", 1));
    EXPECT_TRUE(save_filled(store, "second", 2));
    std::vector<uint32_t> blocks;
    for (int i = 0; i < 3; ++i) blocks.push_back(store.member->allocate(4096, true)->block);
    EXPECT_TRUE(store->save("many", "text", blocks));
    for (const uint32_t block : blocks) store.member->release(block, Mode::kReadWrite);
    EXPECT_TRUE(save_filled(store, long_key, 3));
    EXPECT_TRUE(save_filled(store, "bound", 4, 5000, {.bound = true}));
    EXPECT_TRUE(store->save(std::string("\0mark", 5), "", {}));
    EXPECT_TRUE(save_filled(store, "removed", 5));
    removed = cell("removed");
    gone = slot("removed");
    EXPECT_TRUE(store->remove("removed"));
    data = os::Mapping::map(os::Mapping::Kind::kShared, store->fd(), store::offsets::kTotal).take();
  }

  uint32_t slot(const std::string& key) const {
    const store::Key wanted(key);
    for (uint32_t i = 0; i < store::kWindow; ++i) {
      const uint32_t index = store::slot_index(wanted.hash, 0, i);
      const SlotValue v = slot_value(index);
      if (v.state == SlotState::kNamed && v.tag == wanted.tag) return index;
    }
    ADD_FAILURE() << key;
    return 0;
  }
  SlotValue slot_value(uint32_t index) const { return SlotValue::of(store->slot(index).value.load()); }
  uint32_t cell(const std::string& key) const { return slot_value(slot(key)).cell; }
  static void set(pool::AtomicPair& at, Pair to) {
    Pair found = at.load();
    while (!at.exchange_if(found, to)) {
    }
  }
  uint32_t change_slot(uint32_t index, const std::function<void(SlotValue&)>& change) const {
    SlotValue value = slot_value(index);
    change(value);
    set(store->slot(index).value, value.pair());
    return index;
  }
  uint32_t change_cell(uint32_t index, const std::function<void(CellValue&)>& change) const {
    CellValue value = CellValue::of(store->word(index).value.load());
    change(value);
    set(store->word(index).value, value.pair());
    return index;
  }
  uint32_t change_body(uint32_t index, const std::function<void(Body&)>& change) const {
    Body body = store::load_body(data.data(), index);
    change(body);
    store::store_body(data.data(), index, body);
    return index;
  }
  void change_standing(const std::string& key, const std::function<void(StandingValue&)>& change) const {
    pool::AtomicPair& word = store->use_of(cell(key)).standing;
    StandingValue value = StandingValue::of(word.load());
    change(value);
    set(word, value.pair());
  }
  Body body(const std::string& key) const { return store::load_body(data.data(), cell(key)); }
  uint32_t change_ticket(uint32_t index, const std::function<void(TicketValue&)>& change) const {
    TicketValue value = TicketValue::of(arena().ticket(index).value.load());
    change(value);
    set(arena().ticket(index).value, value.pair());
    return index;
  }
  std::byte* overflow_of(const std::string& key) const {
    return arena().data() + arena().extent(body(key).overflow.block)->offset;
  }
  // A slot behind the one of a key in which the key may be as well.
  uint32_t further(const std::string& key) const {
    const store::Key wanted(key);
    const uint32_t taken = slot(key);
    for (uint32_t i = 0; i < store::kWindow; ++i) {
      const uint32_t index = store::slot_index(wanted.hash, 0, i);
      if (index != taken && slot_value(index).state == SlotState::kEmpty) return index;
    }
    ADD_FAILURE() << key;
    return 0;
  }
  store::Header& header() const { return store->header(); }
  Arena& arena() const { return store.member->arena(); }
  CatalogueReport check(bool at_rest) const {
    auto report = store::check_catalogue(store->fd(), arena(), at_rest);
    EXPECT_TRUE(report.ok()) << report.status().what();
    return report.ok() ? report.take() : CatalogueReport{};
  }

  const std::string long_key = "long/" + std::string(200, 'k');
  Store store, other;
  os::Mapping data;
  uint32_t removed = 0, gone = 0;
};

using Texts = std::vector<std::string>;

std::string the(const char* what, uint64_t index) { return std::string(what) + " " + std::to_string(index) + " "; }

struct Damage {
  const char* name;
  int invariant;
  bool at_rest;                        // not wrong while clients are at work
  std::function<Texts(Scene&)> cause;  // returns what the message says

  friend void PrintTo(const Damage& damage, std::ostream* to) { *to << damage.name; }
};

const Damage kDamages[] = {
    // The header.
    {"Version", 10, false, [](Scene& s) { return ++s.header().version, Texts{"version"}; }},
    {"LayoutHash", 10, false, [](Scene& s) { return ++s.header().layout_hash, Texts{"layout_hash"}; }},
    {"Size", 10, false, [](Scene& s) { return ++s.header().size, Texts{"header size"}; }},
    {"Ready", 10, false, [](Scene& s) { return s.header().ready = 0, Texts{"ready"}; }},
    {"Created", 10, false, [](Scene& s) { return s.header().created = 0, Texts{"created"}; }},
    {"NoName", 10, false, [](Scene& s) { return s.header().name[0] = 0, Texts{"name"}; }},
    {"NameWithoutAnEnd", 10, false,
     [](Scene& s) { return std::memset(s.header().name, 'x', sizeof s.header().name), Texts{"name"}; }},
    {"NoLevels", 10, false, [](Scene& s) { return s.header().levels = 0, Texts{"levels is 0"}; }},
    {"TooManyLevels", 10, false, [](Scene& s) { return s.header().levels = 9, Texts{"levels is 9"}; }},
    {"CellsUsedTooHigh", 10, false, [](Scene& s) { return s.header().cells_used = ~0U, Texts{"cells_used is 42949"}; }},
    {"CellsUsedTooLow", 10, false,
     [](Scene& s) {
       return s.header().cells_used = 1, Texts{the("cell", s.cell("second")), "beyond cells_used 1"};
     }},
    {"Bell", 10, false,
     [](Scene& s) {
       reinterpret_cast<store::Bell*>(s.data.data() + store::offsets::kBellsAt)[7].waiting = 2;
       return Texts{"bell 7", "waiting is 2"};
     }},
    // Slots.
    {"SlotBeyondTheLevels", 10, false,
     [](Scene& s) {
       const uint32_t far = store::level_start(1) + 5;
       s.change_slot(far, [](SlotValue& v) { v.state = SlotState::kGone, v.sequence = 1; });
       return Texts{the("slot", far), "beyond level 1"};
     }},
    {"EmptySlotThatIsNot", 10, false,
     [](Scene& s) {
       s.change_slot(s.further("small"), [](SlotValue& v) { v.sequence = 3; });
       return Texts{the("slot", s.further("small")), "all zero"};
     }},
    {"FreeSlotThatNamesACell", 10, false,
     [](Scene& s) {
       return s.change_slot(s.gone, [](SlotValue& v) { v.cell = 1; }), Texts{the("slot", s.gone), "names no cell"};
     }},
    {"NoSuchCell", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.change_slot(s.slot("small"), [](SlotValue& v) { v.cell = ~0U; });
       return Texts{the("slot", slot), "no such cell"};
     }},
    {"CellBeyondTheMark", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.change_slot(s.slot("small"), [](SlotValue& v) { v.cell = 5000; });
       return Texts{the("slot", slot), "no such cell"};
     }},
    {"AnotherLife", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.change_slot(s.slot("small"), [](SlotValue& v) { ++v.life; });
       return Texts{the("slot", slot), the("names cell", s.slot_value(slot).cell), "life 1"};
     }},
    {"FreeCell", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.change_slot(s.slot("small"), [&](SlotValue& v) { v.cell = s.removed; });
       return Texts{the("slot", slot), the("names cell", s.removed), "free"};
     }},
    {"ReleasedCell", 11, false,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(s.cell("small"), [&](CellValue& v) {
         v.state = CellState::kReleasing, v.owner = s.store.member->identity();
       });
       return Texts{the("slot", s.slot("small")), the("names cell", cell), "releasing"};
     }},
    {"ClaimForAStandingCell", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.change_slot(s.slot("small"), [](SlotValue& v) { v.state = SlotState::kClaimed; });
       return Texts{the("slot", slot), "claimed", "standing"};
     }},
    {"Tag", 11, false,
     [](Scene& s) {
       const uint32_t slot = s.slot("small");
       s.change_slot(slot, [](SlotValue& v) { v.tag ^= 1; });
       return Texts{the("slot", slot), "looked for"};
     }},
    {"OffTheProbePath", 11, false,
     [](Scene& s) {
       const uint32_t from = s.slot("small"), to = (from + 100) % store::level_size(0);
       s.change_slot(to, [&](SlotValue& v) { v = s.slot_value(from); });
       s.change_slot(from, [](SlotValue& v) { v.state = SlotState::kGone, v.cell = v.life = 0; });
       return Texts{the("slot", to), "looked for"};
     }},
    {"SlotBehindAnEmptyOne", 11, false,
     [](Scene& s) {
       const store::Key key("small");
       const uint32_t from = s.slot("small"), cell = s.cell("small"), to = store::slot_index(key.hash, 0, 15);
       s.change_slot(to, [&](SlotValue& v) { v = s.slot_value(from); });
       s.change_slot(from, [](SlotValue& v) { v = SlotValue{}; });
       return Texts{the("cell", cell), "no slot names it"};
     }},
    {"TwoSlotsOfACell", 11, false,
     [](Scene& s) {
       const uint32_t from = s.slot("small"), to = s.further("small");
       s.change_slot(to, [&](SlotValue& v) { v = s.slot_value(from); });
       return Texts{the("slot", std::max(from, to)), "names the cell of " + the("slot", std::min(from, to))};
     }},
    {"TwoSlotsOfAKey", 11, false,
     [](Scene& s) {
       const uint32_t from = s.slot("small"), to = s.further("small");
       const Body small = s.body("small");
       s.change_body(s.cell("second"), [&](Body& b) {
         b.hash = small.hash, b.key_bytes = small.key_bytes;
         std::memcpy(b.text, small.text, sizeof b.text);
       });
       const uint32_t second = s.slot("second");
       s.change_slot(to, [&](SlotValue& v) { v = s.slot_value(second), v.tag = s.slot_value(from).tag; });
       s.change_slot(second, [](SlotValue& v) { v.state = SlotState::kGone, v.cell = v.life = 0; });
       return Texts{"slot ", "\"small\"", "the same key as slot"};
     }},
    {"ClaimAtRest", 13, true,
     [](Scene& s) {
       const uint64_t me = s.store.member->identity();
       s.change_cell(s.cell("small"), [&](CellValue& v) { v.state = CellState::kMaking, v.owner = me; });
       const uint32_t slot = s.change_slot(s.slot("small"), [](SlotValue& v) { v.state = SlotState::kClaimed; });
       return Texts{the("slot", slot), "claim at rest"};
     }},
    // Beside the cells.
    {"KnownOfAnotherLife", 14, false,
     [](Scene& s) {
       s.change_standing("small", [](StandingValue& v) { ++v.life; });
       return Texts{the("cell", s.cell("small")), "is of life 2"};
     }},
    {"NoPolicy", 14, false,
     [](Scene& s) {
       s.change_standing("small", [](StandingValue& v) { v.policy = static_cast<store::Policy>(9); });
       return Texts{the("cell", s.cell("small")), "policy and flags"};
     }},
    {"NoFlags", 14, false,
     [](Scene& s) {
       s.change_standing("small", [](StandingValue& v) { v.flags = 64; });
       return Texts{the("cell", s.cell("small")), "policy and flags"};
     }},
    {"OnDiskWithoutAFile", 14, false,
     [](Scene& s) {
       s.change_standing("small", [](StandingValue& v) { v.flags = store::kSpilled; });
       return Texts{the("cell", s.cell("small")), "on disk, and no file"};
     }},
    {"OnDiskWithBlocks", 14, false,
     [](Scene& s) {
       const uint32_t cell = s.cell("small");
       s.change_standing("small",
                         [&](StandingValue& v) { v.flags = store::kSpilled, v.file = uint64_t{cell} << 32 | 1; });
       return Texts{the("cell", cell), "on disk, and 1 blocks in memory"};
     }},
    {"AFileThatNobodyWrote", 14, false,
     [](Scene& s) {
       const uint32_t cell = s.cell("small");
       s.change_standing("small", [&](StandingValue& v) { v.file = uint64_t{cell} << 32 | 9; });
       return Texts{the("cell", cell), "no cell ever wrote"};
     }},
    {"AFileOfTwoNames", 14, false,
     [](Scene& s) {
       const uint32_t cell = s.cell("small");
       for (const char* key : {"small", "second"})
         s.change_standing(key, [&](StandingValue& v) { v.file = uint64_t{cell} << 32 | 1; });
       return Texts{"has the file", "of slot "};
     }},
    {"ClaimedByNobody", 14, false,
     [](Scene& s) {
       s.store->use_of(s.cell("small")).claim = uint64_t{900} << 12 | 3;
       return Texts{the("cell", s.cell("small")), "claimed, and no lease was ever"};
     }},
    {"MoreBytesThanItHas", 14, false,
     [](Scene& s) {
       s.store->use_of(s.cell("many")).bytes = 3 * 4096 + 1;
       return Texts{the("cell", s.cell("many")), "of 12289 bytes, and its blocks have 12288"};
     }},
    // Cells.
    {"CellState", 10, false,
     [](Scene& s) {
       s.change_cell(s.removed, [](CellValue& v) { v.state = static_cast<CellState>(9); });
       return Texts{the("cell", s.removed), "state 9"};
     }},
    {"FreeCellWithAnOwner", 10, false,
     [](Scene& s) {
       return s.change_cell(s.removed, [](CellValue& v) { v.owner = 77; }), Texts{the("cell", s.removed), "nobody's"};
     }},
    {"FreeCellWithABody", 10, false,
     [](Scene& s) {
       return s.change_body(s.removed, [](Body& b) { b.pid = 1; }), Texts{the("cell", s.removed), "body is zero"};
     }},
    {"NoLife", 10, false,
     [](Scene& s) {
       s.change_cell(s.removed, [&](CellValue& v) {
         v.state = CellState::kReleasing, v.life = 0, v.owner = s.store.member->identity();
       });
       return Texts{the("cell", s.removed), "has a life"};
     }},
    {"StandingWithAnOwner", 10, false,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(s.cell("small"), [](CellValue& v) { v.owner = 1 << 12; });
       return Texts{the("cell", cell), "standing cell is nobody's"};
     }},
    {"OwnerOutOfRange", 10, false,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(s.cell("bound"), [](CellValue& v) { v.owner = 1 << 12 | 2000; });
       return Texts{the("cell", cell), "lease 2000"};
     }},
    {"OwnerOfTheFuture", 10, false,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(s.cell("bound"), [](CellValue& v) { v.owner = 99 << 12; });
       return Texts{the("cell", cell), "incarnation 99"};
     }},
    {"MadeByNobody", 10, false,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(s.cell("small"), [](CellValue& v) { v.state = CellState::kMaking; });
       return Texts{the("cell", cell), "making", "no lease was ever nobody"};
     }},
    {"LostSlot", 11, false,
     [](Scene& s) {
       const uint32_t cell = s.cell("small");
       s.change_slot(s.slot("small"), [](SlotValue& v) { v.state = SlotState::kGone, v.cell = v.life = 0; });
       return Texts{the("cell", cell), "no slot names it"};
     }},
    {"MakingAtRest", 13, true,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(
           s.cell("small"), [&](CellValue& v) { v.state = CellState::kMaking, v.owner = s.store.member->identity(); });
       return Texts{the("cell", cell), "between two states"};
     }},
    {"LeavingAtRest", 13, true,
     [](Scene& s) {
       const uint32_t cell = s.change_cell(
           s.cell("small"), [&](CellValue& v) { v.state = CellState::kLeaving, v.owner = s.store.member->identity(); });
       return Texts{the("cell", cell), "between two states"};
     }},
    {"ReleasingAtRest", 13, true,
     [](Scene& s) {
       s.change_cell(s.removed,
                     [&](CellValue& v) { v.state = CellState::kReleasing, v.owner = s.store.member->identity(); });
       return Texts{the("cell", s.removed), "between two states"};
     }},
    {"BoundToTheDead", 13, true,
     [](Scene& s) {
       const uint64_t owner = s.other.member->identity();
       const uint32_t cell = s.change_cell(s.cell("bound"), [&](CellValue& v) { v.owner = owner; });
       s.change_body(cell, [&](Body& b) { b.owner = owner; });
       s.other.member->membership().abandon(s.other.member->arena());
       return Texts{the("cell", cell), "its owner is dead"};
     }},
    // Bodies.
    {"Hash", 11, false,
     [](Scene& s) {
       const uint32_t cell = s.change_body(s.cell("small"), [](Body& b) { b.hash ^= 1 << 10; });
       return Texts{the("slot", s.slot("small")), the("cell", cell), "looked for"};
     }},
    {"Key", 11, false,
     [](Scene& s) {
       const uint32_t cell = s.change_body(s.cell("small"), [](Body& b) { b.text[0] = 'S'; });
       return Texts{the("slot", s.slot("small")), "\"Small\"", the("cell", cell), "hash"};
     }},
    {"KeyElsewhere", 11, false,
     [](Scene& s) {
       s.overflow_of(s.long_key)[3] = std::byte{'X'};
       return Texts{the("slot", s.slot(s.long_key)), "\"lonX/", "hash"};
     }},
    {"NoKey", 12, false,
     [](Scene& s) {
       return s.change_body(s.cell("small"), [](Body& b) { b.key_bytes = 0; }),
              Texts{the("slot", s.slot("small")), "0 bytes"};
     }},
    {"KeyTooLong", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.key_bytes = ~0U; });
       return Texts{the("slot", s.slot("small")), "key of 4294967295 bytes"};
     }},
    {"TextTooLong", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.text_bytes = ~0U; });
       return Texts{the("slot", s.slot("small")), "description of 4294967295"};
     }},
    {"TooManyParts", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("many"), [](Body& b) { b.parts = ~0U; });
       return Texts{the("slot", s.slot("many")), "4294967295 blocks"};
     }},
    {"TicketWithoutABlock", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.parts = 0; });
       return Texts{the("slot", s.slot("small")), "a ticket, and no blocks"};
     }},
    {"BoundBodyOfAStandingCell", 11, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.owner = 1 << 12; });
       return Texts{the("slot", s.slot("small")), "bound to lease 0", "standing"};
     }},
    {"BoundToAnother", 11, false,
     [](Scene& s) {
       s.change_body(s.cell("bound"), [&](Body& b) { b.owner = s.other.member->identity(); });
       return Texts{the("slot", s.slot("bound")), "bound to lease 1", "cell to lease 0"};
     }},
    // The overflow block.
    {"NoOverflow", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("many"), [](Body& b) { b.overflow = {}; });
       return Texts{the("slot", s.slot("many")), "\"many\"", "has no overflow block"};
     }},
    {"OverflowWithoutNeed", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.overflow = b.first; });
       return Texts{the("slot", s.slot("small")), "without need"};
     }},
    {"OverflowTooShort", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("many"), [](Body& b) { b.parts = 5000; });
       return Texts{the("slot", s.slot("many")), "bytes do not fit"};
     }},
    {"OverflowOfAnotherGeneration", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("many"), [](Body& b) { ++b.overflow.generation; });
       return Texts{the("slot", s.slot("many")), "overflow block: ticket", "generation"};
     }},
    // Tickets and blocks.
    {"NoSuchBlock", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.first.block = ~0U; });
       return Texts{the("slot", s.slot("small")), "no such block or ticket"};
     }},
    {"NoSuchTicket", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { b.first.ticket = ~0U; });
       return Texts{the("slot", s.slot("small")), "no such block or ticket"};
     }},
    {"AnotherIssueOfTheTicket", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { ++b.first.nonce; });
       return Texts{the("slot", s.slot("small")), "is not out for it"};
     }},
    {"TicketTakenBack", 12, false,
     [](Scene& s) {
       const uint32_t ticket = s.change_ticket(s.body("small").first.ticket, [](TicketValue& v) { v.sender = 0; });
       return Texts{the("slot", s.slot("small")), "\"small\"", the("ticket", ticket), "not out for it"};
     }},
    {"TicketOfASender", 12, false,
     [](Scene& s) {
       const uint32_t ticket = s.change_ticket(s.body("small").first.ticket,
                                               [](TicketValue& v) { v.sender = TicketValue::sender_of(0, 1); });
       return Texts{the("slot", s.slot("small")), the("ticket", ticket), "not out for it"};
     }},
    {"TicketOfAnotherBlock", 12, false,
     [](Scene& s) {
       s.change_ticket(s.body("small").first.ticket, [&](TicketValue& v) { v.block = s.body("second").first.block; });
       return Texts{the("slot", s.slot("small")), "is not out for it"};
     }},
    {"PartInTheListTakenBack", 12, false,
     [](Scene& s) {
       store::Part part;
       std::memcpy(&part, s.overflow_of("many") + sizeof part, sizeof part);
       s.change_ticket(part.ticket, [](TicketValue& v) { v.sender = 0; });
       return Texts{the("slot", s.slot("many")), the("ticket", part.ticket), "is not out for it"};
     }},
    {"AnotherGenerationOfTheBlock", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("small"), [](Body& b) { ++b.first.generation; });
       return Texts{the("slot", s.slot("small")), "the block is"};
     }},
    {"FreedBlock", 12, false,
     [](Scene& s) {
       pool::BlockValue block = pool::BlockValue::of(s.arena().block(s.body("small").first.block).value.load());
       block.live = false, block.count = 0;
       Scene::set(s.arena().block(s.body("small").first.block).value, block.pair());
       return Texts{the("slot", s.slot("small")), "the block is", "free"};
     }},
    {"ListedTwice", 12, false,
     [](Scene& s) {
       std::byte* list = s.overflow_of("many");
       std::memcpy(list + sizeof(store::Part), list, sizeof(store::Part));
       return Texts{the("cell", s.cell("many")), "is listed twice"};
     }},
    {"ListedByTwoCells", 12, false,
     [](Scene& s) {
       s.change_body(s.cell("second"), [&](Body& b) { b.first = s.body("small").first; });
       return Texts{"is listed by cell ", " too"};
     }},
    {"ForgottenTicket", 12, false,
     [](Scene& s) {
       auto view = s.store.member->allocate(5000, false);
       auto handle = s.store.member->issue(view->block);
       EXPECT_TRUE(s.store.member->keep(*handle));
       return Texts{the("ticket", handle->ticket), the("block", view->block).substr(0, 6), "no cell lists it"};
     }},
};

class DamagedStore : public testing::TestWithParam<Damage> {};

TEST_P(DamagedStore, IsNamed) {
  Scene scene;
  ASSERT_EQ(scene.check(true).first(), "");
  const Texts texts = GetParam().cause(scene);
  if (GetParam().at_rest) {
    EXPECT_EQ(scene.check(false).first(), "");
  }
  const CatalogueReport report = scene.check(GetParam().at_rest);
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.first().find("invariant "), std::string::npos);
  bool found = false;
  for (const pool::Violation& v : report.violations) {
    bool all = v.invariant == GetParam().invariant;
    for (const std::string& text : texts) all = all && v.what.find(text) != std::string::npos;
    found = found || all;
  }
  std::string all;
  for (const pool::Violation& v : report.violations) all += "\n  " + std::to_string(v.invariant) + ": " + v.what;
  EXPECT_TRUE(found) << all;
}

INSTANTIATE_TEST_SUITE_P(CatalogueCheck, DamagedStore, testing::ValuesIn(kDamages),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- garbage

uint64_t scrambled(uint64_t i) {
  i = (i + 1) * 0x9e3779b97f4a7c15;
  i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9;
  return i ^ i >> 29;
}

TEST(CatalogueCheck, OfGarbageEndsInAReport) {
  const tests::Watchdog watchdog(60);
  using namespace store::offsets;  // NOLINT
  // A table at a time, so that the others are looked at as well; of the large ones the beginning.
  const std::pair<uint64_t, uint64_t> tables[] = {
      {64, kBellsAt}, {kBellsAt, kSlotsAt}, {kSlotsAt, kWordsAt}, {kWordsAt, kBodiesAt}, {kBodiesAt, kTotal}};
  for (const auto& [begin, end] : tables) {
    for (const bool sparse : {false, true}) {
      Scene scene;
      for (uint64_t at = begin; at < std::min(end, begin + (uint64_t{2} << 20)); at += 8) {
        const uint64_t word = sparse && scrambled(at) % 64 != 0 ? 0 : scrambled(~at);
        std::memcpy(scene.data.data() + at, &word, 8);
      }
      for (const bool at_rest : {false, true}) {
        const CatalogueReport report = scene.check(at_rest);
        EXPECT_FALSE(report.ok()) << begin;
        EXPECT_LT(report.violations.size(), 1000U);
      }
    }
  }
}

// ---- sound stores

TEST(CatalogueCheck, FindsNothingInASoundStore) {
  auto empty = fresh_store();
  auto report = store::check_catalogue(empty->fd(), empty.member->arena(), true);
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->first(), "");
  EXPECT_EQ(report->names + report->marks + report->cells, 0U);
  Scene scene;
  const CatalogueReport full = scene.check(true);
  EXPECT_EQ(full.first(), "");
  EXPECT_EQ(full.names, 5U);
  EXPECT_EQ(full.marks, 1U);
  EXPECT_EQ(full.cells, 6U);
  EXPECT_EQ(full.names, scene.store->size());
  ASSERT_TRUE(save_filled(scene.store, "short", 1, 5000, {.ttl = 1}));  // expired, and nobody has swept
  EXPECT_EQ(scene.check(true).first(), "");
}

TEST(CatalogueCheck, NeedsNoMembershipAndWritesNothing) {
  Scene scene;
  const auto pages = [](int fd) {
    struct stat st {};
    return ::fstat(fd, &st) == 0 ? st.st_blocks : -1;
  };
  auto opened =
      Arena::inspect(os::duplicate(scene.arena().data_fd()).take(), os::duplicate(scene.arena().control_fd()).take());
  ASSERT_TRUE(opened.ok()) << opened.status().what();
  const auto data = pages(opened->data_fd()), control = pages(opened->control_fd()), own = pages(scene.store->fd());
  auto report = store::check_catalogue(scene.store->fd(), *opened, true);
  ASSERT_TRUE(report.ok()) << report.status().what();
  EXPECT_EQ(report->first(), "");
  EXPECT_EQ(report->names, 5U);
  EXPECT_EQ(pages(opened->data_fd()), data);
  EXPECT_EQ(pages(opened->control_fd()), control);
  EXPECT_EQ(pages(scene.store->fd()), own);
}

TEST(CatalogueCheck, IsToldWhyThereIsNothingToLookAt) {
  Scene scene, another;
  EXPECT_EQ(store::check_catalogue(another.store->fd(), scene.arena()).code(), Code::kForeign);
  EXPECT_EQ(store::check_catalogue(scene.arena().data_fd(), scene.arena()).code(), Code::kInvalid);
  EXPECT_EQ(store::check_catalogue(-1, scene.arena()).code(), Code::kSystem);
  EXPECT_EQ(store::catalogue_name(scene.store->fd())->name, "test");
  scene.header().magic ^= 1;
  EXPECT_EQ(store::check_catalogue(scene.store->fd(), scene.arena()).code(), Code::kInvalid);
  EXPECT_EQ(store::catalogue_name(scene.store->fd()).code(), Code::kInvalid);
}

// Everything that a client does, until it is killed.
class Hammer {
 public:
  Hammer(Store& survivor, uint64_t seed) : random_(seed) {
    store_.member.reset(pool::adopt(tests::join(*survivor.member)));  // its handlers for fork
    store_.catalogue = store::Catalogue::attach(*store_.member, os::duplicate(survivor->fd()).take()).take();
  }

  bool run() {
    for (;;) {
      ::alarm(30);
      if (random_() % 30 == 0) end_up_midway(random_, 100);
      step(true);
    }
  }

 private:
  std::string key() {
    const auto n = random_() % 12;
    return (n < 3 ? std::string(300, 'k') : n == 3 ? std::string("\0", 1) : "k") + std::to_string(n);
  }

  void step(bool may_fork) {
    store::SaveOptions options;
    options.overwrite = random_() % 2 == 0;
    options.bound = random_() % 8 == 0;
    if (random_() % 8 == 0) options.ttl = 1 + random_() % 10'000'000;
    const uint64_t what = random_() % 100;
    if (what < 40) {
      (void)save_filled(store_, key(), static_cast<uint8_t>(random_()), 5000, options);
    } else if (what < 55) {
      std::vector<uint32_t> blocks;
      for (uint64_t i = random_() % 5; i > 0; --i) {
        if (auto view = store_.member->allocate(4096, true)) blocks.push_back(view->block);
      }
      (void)store_->save(key(), std::string(random_() % 300, 't'), blocks, options);
      for (const uint32_t block : blocks) store_.member->release(block, Mode::kReadWrite);
    } else if (what < 75) {
      (void)store_->remove(key());
    } else if (what < 90) {
      (void)store_->find(key());
    } else if (what < 95) {
      (void)store_.member->reap();
      (void)store_->sweep();
    } else if (what == 99 && may_fork) {
      failpoint::disarm();  // nobody would wake the child
      const pid_t pid = ::fork();
      if (pid == 0) {
        for (int i = 0; i < 30; ++i) {
          step(false);
          if (random_() % 40 == 0) ::raise(SIGKILL);
        }
        ::_exit(0);
      }
      (void)wait_for(pid);
    }
  }

  Store store_;
  std::mt19937_64 random_;
};

TEST(CatalogueCheck, RaisesNoFalseAlarmOverClientsAtWork) {
  const SoakSettings settings;
  const tests::Watchdog watchdog(static_cast<unsigned>(settings.seconds) + 90);
  auto store = fresh_store(uint64_t{48} << 20);
  const auto violation = [&](bool at_rest) {
    auto report = store::check_catalogue(store->fd(), store.member->arena(), at_rest);
    return report.ok() ? report->first() : report.status().what();
  };
  CrowdAtWork crowd(settings.seed, [&](uint64_t seed) { return Hammer(store, seed).run(); });
  ASSERT_EQ(crowd.run(settings.seconds, [&] { return violation(false); }), "");
  // Forked children of the killed are nobody's to wait for.
  for (int i = 0; i < 600 && store.member->stats().leases.size() > 1; ++i) ::usleep(10000);
  (void)store->sweep();
  EXPECT_EQ(violation(true), "");
  EXPECT_EQ(pool::check(store.member->arena(), {.at_rest = true}).first(), "");
}

}  // namespace
}  // namespace torchshm::tests
