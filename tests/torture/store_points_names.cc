// Every operation on names, each with what must be there before it; see points_operations.cc.
#include "store_points_names.h"

#include <algorithm>

#include "store/key.h"

namespace torchshm::torture {
namespace {

void must(Scene& s, const Status& status) {
  if (!status) s.wrong("while getting ready: %s", status.what().c_str());
}

// Keys that are looked for from the same slot on, so many that their part of the first level is full, and one more.
const std::vector<std::string>& crowd() {
  static const auto* keys = [] {
    auto* found = new std::vector<std::string>;
    const uint64_t wanted = store::hash_of("crowd") & (store::level_size(0) - 1);
    for (uint64_t i = 0; found->size() <= store::kWindow; ++i) {
      std::string key = "crowd/" + std::to_string(i);
      if ((store::hash_of(key) & (store::level_size(0) - 1)) == wanted) found->push_back(std::move(key));
    }
    return found;
  }();
  return *keys;
}

Status get_or_create(Scene& s, const std::string& key) {
  const std::string mark = std::string(1, '\0') + key;
  if (Status marked = names(s).save(mark, "0 0 0", {}, {.bound = true}); !marked) return marked;
  Status saved = put(s, key, kNew, kOne);
  if (!names(s).remove(mark) && saved) s.wrong("the mark has gone before it was taken down");
  return saved;
}

Scene* rivals = nullptr;

}  // namespace

void add_names(std::vector<Operation>& all) {
  // Says how far it has come; a rival of the driver's may have come first.
  const auto add = [&](const char* name, uint32_t flags, std::function<void(Scene&)> prepare,
                       std::function<Status(Scene&)> act) {
    all.push_back({name, flags | kOwn,
                   [prepare](Scene& s) {
                     (void)names(s);
                     prepare(s);
                   },
                   [act](Scene& s) {
                     expected->phase = 1;
                     Status status = act(s);
                     if (status.code() == Code::kExists && expected->contested != 0) status = Status();
                     expected->phase = status ? 2 : 3;
                     return status;
                   }});
  };
  const auto nothing = [](Scene&) { expect("new", {kMissing}, {kNew}); };
  const auto saving = [](const Shape& shape) { return [shape](Scene& s) { return put(s, "new", kNew, shape); }; };
  const auto there = [](const Shape& shape, uint64_t after) {
    return [shape, after](Scene& s) {
      expect("there", {kOld}, {after});
      must(s, put(s, "there", kOld, shape));
    };
  };

  // -- save
  add("save_small", 0, nothing, saving(kOne));
  add("save_large", 0, nothing, saving(kBig));
  add("save_many", 0, nothing, saving(kMany3));
  add("save_text", 0, nothing, saving(kText));
  add("save_a_first", kFresh | kParked, nothing, saving(kOne));
  add(
      "save_over_a_limit_of_blocks", kMayFill,
      [](Scene& s) {
        expect("new", {kMissing}, {kNew});
        s.press(kLargeBytes / 2);
      },
      saving(kBig));
  add("save_what_is_there", 0, there(kOne, kOld), [](Scene& s) {
    Status saved = put(s, "there", kNew, kOne);
    if (saved && expected->contested == 0) s.wrong("a name was saved twice");
    return saved.code() == Code::kExists ? Status() : std::move(saved);
  });
  add(
      "save_where_all_is_full", kFresh | kParked,
      [](Scene& s) {
        expect(crowd().back(), {kMissing}, {kNew});
        for (size_t i = 0; i < store::kWindow; ++i) must(s, put(s, crowd()[i], 1 + i, kText));
      },
      [](Scene& s) { return put(s, crowd().back(), kNew, kOne); });
  // Just then somebody else saves the same name.
  static const char* moment = nullptr;
  for (const auto& [name, when] : {std::pair("save_against_a_rival_before_the_claim", "save.looked"),
                                   std::pair("save_against_a_rival_after_the_claim", "save.claimed")}) {
    add(
        name, 0,
        [](Scene& s) {
          expect("new", {kMissing, kRivals}, {kNew, kRivals});
          rivals = &s;
        },
        [when = when](Scene& s) {
          moment = when;
          here.hook = [](const char* point) {
            if (std::strcmp(point, moment) != 0) return;
            here.hook = nullptr;
            rivals->helper([](Scene& rival) { must(rival, put(rival, "new", kRivals, kOne)); });
          };
          Status saved = put(s, "new", kNew, kOne);
          if (saved && expected->contested == 0) s.wrong("a name was saved twice");
          return saved.code() == Code::kExists ? Status() : std::move(saved);
        });
  }
  add(
      "save_over_the_claim_of_a_dead", kReaps,
      [](Scene& s) {
        expect("new", {kMissing}, {kNew});
        s.victim([](Scene& v) { (void)put(v, "new", kRivals, kOne); }, "save.claimed");
      },
      saving(kOne));
  add("get_or_create", 0, nothing, [](Scene& s) { return get_or_create(s, "new"); });
  add(
      "bound", 0,
      [](Scene&) {
        expect("new", {kMissing, kNew}, {kMissing, kNew});
      },  // in the end none is left of the dead
      [](Scene& s) { return put(s, "new", kNew, kMany3, {.bound = true}); });

  // -- overwrite, remove, expire
  add("overwrite", 0, there(kOne, kNew), [](Scene& s) { return put(s, "there", kNew, kOne, {.overwrite = true}); });
  add("overwrite_many", 0, there(kMany3, kNew),
      [](Scene& s) { return put(s, "there", kNew, kMany3, {.overwrite = true}); });
  add("overwrite_nothing", 0, nothing, [](Scene& s) { return put(s, "new", kNew, kOne, {.overwrite = true}); });
  const auto remove = [](Scene& s) {
    if (!names(s).remove("there") && expected->contested == 0) s.wrong("what was there could not be removed");
    return Status();
  };
  add("remove", 0, there(kOne, kMissing), remove);
  add("remove_many", 0, there(kMany3, kMissing), remove);
  // Of a name that is bound to another, who lives: whoever dies over it leaves it as it was.
  add(
      "overwrite_what_is_bound", kBoundThere, [](Scene&) { expect("there", {kOld}, {kNew}); },
      [](Scene& s) { return put(s, "there", kNew, kOne, {.overwrite = true}); });
  add(
      "remove_what_is_bound", kBoundThere, [](Scene&) { expect("there", {kOld}, {kMissing}); }, remove);
  const auto expired = [](Scene& s) {
    expect("there", {kMissing}, {kMissing});
    must(s, put(s, "there", kOld, kMany3, {.ttl = 1}));
  };
  add("expire_at_a_look", 0, expired, [](Scene& s) {
    if (names(s).contains("there") && expected->contested == 0) s.wrong("an expired name is there");
    return Status();
  });
  add("expire_at_a_sweep", 0, expired, [](Scene& s) {
    (void)names(s).sweep();
    return Status();
  });
  add(
      "overwrite_what_expired", 0,
      [expired](Scene& s) {
        expired(s);
        expect("there", {kMissing}, {kNew});
      },
      [](Scene& s) { return put(s, "there", kNew, kOne, {.overwrite = true}); });
  add("list", 0, there(kMany3, kOld), [](Scene& s) {
    const std::vector<std::string> keys = names(s).keys("");
    if (std::find(keys.begin(), keys.end(), "there") == keys.end() && expected->contested == 0)
      s.wrong("what was there is not listed");
    return Status();
  });
  add("load", 0, there(kMany3, kOld), [](Scene& s) {
    if (get(s, "there") != kOld && expected->contested == 0) s.wrong("what was there could not be loaded");
    return Status();
  });

  // -- for the dead
  struct Death {
    const char* name;
    const char* at;
    bool saves;  // else it removes
  };
  static constexpr Death kDeaths[] = {
      {"sweep_a_cell", "save.cell", true},
      {"sweep_a_body", "save.body", true},
      {"sweep_an_overflow", "save.overflow", true},
      {"sweep_a_part", "save.part", true},
      {"sweep_what_is_kept", "save.kept", true},
      {"sweep_a_claim", "save.claimed", true},
      {"sweep_a_name", "save.published", true},
      {"sweep_a_mark", "replace.marked", false},
      {"sweep_a_gone", "replace.exchanged", false},
      {"sweep_a_release", "replace.releasing", false},
      {"sweep_a_part_released", "release.part", false},
      {"sweep_a_cleared", "release.cleared", false},
  };
  for (const Death& death : kDeaths) {
    add(
        death.name, kReaps,
        [death](Scene& s) {
          if (death.saves) {
            expect("new", {kMissing, kNew}, {kMissing, kNew});
          } else {
            expect("there", {kOld, kMissing}, {kOld, kMissing});
            must(s, put(s, "there", kOld, kMany3));
          }
          s.victim(
              [death](Scene& v) {
                if (death.saves) {
                  (void)put(v, "new", kNew, kMany3);
                } else {
                  (void)names(v).remove("there");
                }
              },
              death.at);
        },
        [](Scene& s) {
          (void)s.member->reap();
          (void)names(s).sweep();
          return Status();
        });
  }
  add(
      "sweep_a_bound_name", kReaps,
      [](Scene& s) {
        expect("new", {kMissing, kNew}, {kMissing, kNew});
        s.victim([](Scene& v) { must(v, put(v, "new", kNew, kMany3, {.bound = true})); });
      },
      [](Scene& s) {
        (void)s.member->reap();
        (void)names(s).sweep();
        return Status();
      });

  add(
      "create", 0, [](Scene&) {},
      [](Scene& s) {
        auto made = store::Catalogue::create(*s.member, "another", {});
        return made ? Status() : std::move(made.status());
      });
}

}  // namespace torchshm::torture
