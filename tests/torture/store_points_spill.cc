// Every operation that moves values between memory and disk, each with what must be there before it.
#include <fcntl.h>

#include <cstring>

#include "os/memfd.h"
#include "store/spill.h"
#include "store/spill_file.h"
#include "store_points_names.h"

namespace torchshm::torture {
namespace {

using store::Policy;
using How = store::Spill::How;

void must(Scene& s, const Status& status) {
  if (!status) s.wrong("while getting ready: %s", status.what().c_str());
}

// In a catalogue, who spills is private: one beside it.
std::unique_ptr<store::Spill> spill;
store::Catalogue* spill_is_of = nullptr;

store::Spill& spill_of(Scene& s) {
  if (spill == nullptr || spill_is_of != &names(s)) {
    spill_is_of = &names(s);
    spill = std::make_unique<store::Spill>(*spill_is_of);
    spill->use(join_directory(s));
  }
  return *spill;
}

Status out(Scene& s, const char* key, How how) {
  auto entry = names(s).find(key);
  if (!entry) return entry.code() == Code::kMissing ? Status() : std::move(entry.status());
  auto went = spill_of(s).out(entry->cell, entry->life, how);
  if (!went && went.code() != Code::kBusy) return std::move(went.status());
  return {};
}

// The survivor may be at it.
Status back(Scene& s, bool alone = true) {
  Status status = names(s).restore("there", alone);
  return status.code() == Code::kBusy ? Status() : std::move(status);
}

// Holds the value as one does who is about to write to it; it is not written to. The blocks are given up with the result.
void touch(Scene& s) {
  auto entry = names(s).load("there");
  if (!entry || entry->spilled) return;
  auto held = names(s).hold_for_writing(*entry);
  if (!held && held.code() != Code::kBusy && held.code() != Code::kStale)
    s.wrong("hold_for_writing: %s", held.status().what().c_str());
}

Scene* rivals = nullptr;
const char* moment = nullptr;
void (*meanwhile)(Scene&) = nullptr;

// At that point of what this process does next, another one comes and does something.
void when(Scene& s, const char* point, void (*act)(Scene&)) {
  rivals = &s;
  moment = point;
  meanwhile = act;
  here.hook = [](const char* passed) {
    if (std::strcmp(passed, moment) != 0) return;
    here.hook = nullptr;
    rivals->helper([](Scene& rival) { meanwhile(rival); });
  };
}

void restore_beside(Scene& s) { (void)names(s).restore("there", false); }
void spill_beside(Scene& s) { (void)out(s, "there", How::kWrite); }
void remove_beside(Scene& s) { (void)names(s).remove("there"); }
void overwrite_beside(Scene& s) { (void)put(s, "there", kRivals, kOne, {.overwrite = true}); }
void sweep_beside(Scene& s) { (void)names(s).sweep_files(); }

}  // namespace

void add_spill(std::vector<Operation>& all) {
  const auto add = [&](std::string name, uint32_t flags, std::function<void(Scene&)> prepare,
                       std::function<Status(Scene&)> act) {
    static std::vector<std::unique_ptr<std::string>> kept;
    kept.push_back(std::make_unique<std::string>(std::move(name)));
    all.push_back({kept.back()->c_str(), flags | kOwn,
                   [prepare](Scene& s) {
                     (void)spill_of(s);
                     prepare(s);
                   },
                   [act](Scene& s) {
                     expected->phase = 1;
                     Status status = act(s);
                     expected->phase = status ? 2 : 3;
                     spill.reset();
                     return status;
                   }});
  };
  const auto there = [](const store::SaveOptions& options = {}) {
    return [options](Scene& s) {
      expect("there", {kOld}, {kOld});
      must(s, put(s, "there", kOld, kMany3, options));
    };
  };
  const auto copied = [](Scene& s) {
    expect("there", {kOld}, {kOld});
    must(s, put(s, "there", kOld, kMany3));
    must(s, out(s, "there", How::kCopy));
  };
  const auto away = [](Scene& s) {
    expect("there", {kOld}, {kOld});
    must(s, put(s, "there", kOld, kMany3));
    must(s, out(s, "there", How::kWrite));
  };
  const auto spilling = [](How how) { return [how](Scene& s) { return out(s, "there", how); }; };
  const auto restoring = [](Scene& s) { return back(s); };

  // -- one at it
  add("spill", 0, there(), spilling(How::kWrite));
  add("spill_a_copy", 0, there(), spilling(How::kCopy));
  add("spill_what_has_a_copy", 0, copied, spilling(How::kFree));
  add(
      "spill_what_was_written_to", 0,
      [copied](Scene& s) {
        copied(s);
        touch(s);
      },
      spilling(How::kWrite));
  add("restore", 0, away, restoring);
  add(
      "spill_again", 0,
      [away](Scene& s) {
        away(s);
        must(s, back(s, false));
      },
      spilling(How::kWrite));
  add("restore_alone_or_not", 0, away, [](Scene& s) { return back(s, false); });
  add("hold_for_writing", 0, there(), [](Scene& s) {
    touch(s);
    return Status();
  });
  add("set_policy", 0, there(), [](Scene& s) {
    (void)names(s).set_policy("there", Policy::kPin);
    return Status();
  });
  add(
      "drop", 0,
      [](Scene& s) {
        expect("there", {kOld}, {kMissing, kOld});  // the survivor may just hold it
        must(s, put(s, "there", kOld, kMany3, {.policy = Policy::kDrop}));
      },
      spilling(How::kFree));
  add(
      "overwrite_what_is_on_disk", 0,
      [away](Scene& s) {
        away(s);
        expect("there", {kOld}, {kNew});
      },
      [](Scene& s) { return put(s, "there", kNew, kOne, {.overwrite = true}); });
  for (const bool copy : {false, true}) {
    add(
        copy ? "remove_what_has_a_copy" : "remove_what_is_on_disk", 0,
        [away, copied, copy](Scene& s) {
          copy ? copied(s) : away(s);
          expect("there", {kOld}, {kMissing});
        },
        [](Scene& s) {
          (void)names(s).remove("there");
          return Status();
        });
  }
  const auto remove_beside_a_service = [](Scene& s, const char* key) {
    // Of the driver, who lives.
    const uint64_t lease = s.member->arena().lease(0).word.load();
    names(s).header().service.store(lease >> 8 << 12);
    (void)names(s).remove(key);
    names(s).header().service.store(0);
  };
  for (const bool large : {false, true}) {
    add(
        large ? "remove_what_leaves_a_spare" : "remove_what_is_on_disk_where_a_service_is", 0,
        [large](Scene& s) {
          expect("there", {kOld}, {kMissing});
          must(s, put(s, "there", kOld, large ? kBig : kMany3));
          must(s, out(s, "there", How::kWrite));
        },
        [remove_beside_a_service](Scene& s) {
          remove_beside_a_service(s, "there");
          return Status();
        });
  }
  const auto with_a_spare = [remove_beside_a_service](Scene& s) {
    expect("there", {kOld}, {kOld});
    must(s, put(s, "gone", kOld, kBig));
    must(s, out(s, "gone", How::kWrite));
    remove_beside_a_service(s, "gone");
    must(s, put(s, "there", kOld, kBig));
  };
  add("spill_into_a_spare", 0, with_a_spare, [](Scene& s) { return out(s, "there", How::kWrite); });
  add("sweep_a_spare", 0, with_a_spare, [](Scene& s) {
    (void)names(s).sweep_discarded(true);
    return Status();
  });
  add(
      "expire_what_is_on_disk", 0,
      [](Scene& s) {
        expect("there", {kMissing}, {kMissing});
        must(s, put(s, "there", kOld, kMany3, {.ttl = 50'000'000}));
        must(s, out(s, "there", How::kWrite));
        while (names(s).contains("there")) continue;
        must(s, put(s, "there", kOld, kMany3, {.ttl = 1}));
      },
      [](Scene& s) {
        (void)names(s).sweep();
        return Status();
      });
  add("make_room", kParked, there({.policy = Policy::kSpill}), [](Scene& s) {
    (void)names(s).make_room(kSmallBytes);
    return Status();
  });
  add(
      "write_ahead", kParked | kMayFill,
      [there](Scene& s) {
        there({.policy = Policy::kSpill})(s);
        s.press(kLargeBytes / 8);
      },
      [](Scene& s) {
        (void)names(s).write_ahead();
        return Status();
      });

  // -- two at it
  struct Pair {
    const char *name, *at;
    bool spills;
    void (*act)(Scene&);
    uint64_t after;
  };
  static constexpr Pair kPairs[] = {
      {"spill_against_a_remover", "spill.written", true, remove_beside, kMissing},
      {"spill_against_an_overwriter", "succeed.filled", true, overwrite_beside, kRivals},
      {"spill_against_a_writer", "spill.claimed", true, touch, kOld},
      {"spill_against_a_sweep_of_files", "spill.written", true, sweep_beside, kOld},
      {"restore_beside_one_who_is_stopped", "restore.read", false, restore_beside, kOld},
      {"restore_against_a_remover", "restore.room", false, remove_beside, kMissing},
      {"restore_against_an_overwriter", "succeed.filled", false, overwrite_beside, kRivals},
      {"restore_against_a_sweep_of_files", "succeed.exchanged", false, sweep_beside, kOld},
  };
  for (const Pair& pair : kPairs) {
    add(
        pair.name, 0,
        [there, away, pair](Scene& s) {
          pair.spills ? there()(s) : away(s);
          expect("there", {kOld, pair.after}, {kOld, pair.after});  // or the survivor came first
        },
        [pair](Scene& s) {
          when(s, pair.at, pair.act);
          Status status = pair.spills ? out(s, "there", How::kWrite) : back(s);
          here.hook = nullptr;
          return status;
        });
  }
  for (const char* point : {"writing.flagged", "writing.held"}) {
    add(std::string("write_against_a_spiller_at_") + (std::strlen(point) == 12 ? "the_holds" : "the_flag"), 0, there(),
        [point](Scene& s) {
          when(s, point, spill_beside);
          touch(s);
          here.hook = nullptr;
          return Status();
        });
  }

  // -- for the dead
  struct Death {
    const char *name, *at;
    bool spills;
  };
  static constexpr Death kDeaths[] = {
      {"finish_a_spill_that_held", "spill.held", true},
      {"finish_a_spill_that_began", "spill.part_made", true},
      {"finish_a_spill_that_wrote", "spill.written", true},
      {"finish_a_spill_that_told", "spill.file_told", true},
      {"finish_a_spill_that_filled", "succeed.filled", true},
      {"finish_a_spill_that_exchanged", "replace.exchanged", true},
      {"finish_a_restore_that_read", "restore.read", false},
      {"finish_a_restore_that_filled", "succeed.filled", false},
      {"finish_a_restore_that_exchanged", "replace.exchanged", false},
      {"finish_a_release_with_its_file", "release.slot_seen", false},
  };
  for (const Death& death : kDeaths) {
    add(
        death.name, kReaps,
        [there, away, death](Scene& s) {
          death.spills ? there()(s) : away(s);
          s.victim(
              [death](Scene& v) {
                (void)(death.spills ? out(v, "there", How::kWrite) : names(v).restore("there", false));
              },
              death.at);
        },
        [](Scene& s) {
          (void)s.member->reap();
          (void)names(s).sweep();
          (void)names(s).sweep_files();
          return Status();
        });
  }

  // -- the directory itself
  static const auto other = [] { return spill_place() + "/other"; };
  add(
      "make_a_directory", 0, [](Scene&) {},
      [](Scene&) {
        auto made = store::SpillDirectory::make(other(), "points", 77, false, -1);
        return made ? Status() : std::move(made.status());
      });
  add(
      "join_a_directory", 0, [](Scene&) {},
      [](Scene& s) {
        auto beside = os::duplicate(names(s).directory_fd());
        if (!beside) return std::move(beside.status());
        auto joined = store::SpillDirectory::join(beside.take(), s.member->pool_id());
        // A name that could not be looked at counts as gone.
        return joined || joined.code() == Code::kMissing ? Status() : std::move(joined.status());
      });
  add(
      "sweep_a_directory", kReaps,
      [](Scene& s) {
        s.victim(
            [](Scene&) {
              auto made = store::SpillDirectory::make(other(), "points", 78, false, -1);
              if (made) (void)(*made)->write({78, 5, "k", "t", {}}, {});
            },
            "spill.renamed");
      },
      [](Scene&) {
        (void)store::sweep_dead(other());
        return Status();
      });
}

}  // namespace torchshm::torture
