// torchshm_store_points: what torchshm_points does to every operation on a pool, done to every one on names and to their service.
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>

#include "os/memfd.h"
#include "os/socket.h"
#include "pool/checker.h"
#include "service/address.h"
#include "store/catalogue_check.h"
#include "store_points_names.h"

namespace torchshm::torture {

Expected* expected = nullptr;

namespace {

int catalogue_fd = -1, spill_fd = -1;
std::string name, directory;

struct Kept {
  const char* key;
  Shape shape;
};
const std::string long_key(300, 'l');
const Kept kKept[] = {{"kept/one", kOne}, {"kept/many", kMany3}, {"kept/big", kBig}, {long_key.c_str(), kText}};

bool one_of(uint64_t seed, const uint64_t (&seeds)[kSeeds]) {
  return std::find(std::begin(seeds), std::end(seeds), seed) != std::end(seeds);
}

// Of values, parts of them, and where they count, spares.
uint64_t spill_files(bool spares) {
  uint64_t count = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(spill_place(), error)) {
    const auto extension = entry.path().extension();
    if (entry.path().string().find("/other/") == std::string::npos)
      count += extension == ".spill" || extension == ".part" || (spares && extension == ".spare") ? 1 : 0;
  }
  return count;
}

// ---- the stages of a trial

void set_up(Scene& d, const Operation& operation) {
  expected->key[0] = 0;
  expected->phase = expected->contested = expected->refused = 0;
  if ((operation.flags & kFresh) != 0) return;
  if ((operation.flags & kBoundThere) != 0) {
    if (Status saved = put(d, "there", kOld, kMany3, {.bound = true}); !saved)
      d.wrong("save a bound name: %s", saved.what().c_str());
  }
  for (size_t i = 0; i < std::size(kKept); ++i) {
    if (Status saved = put(d, kKept[i].key, 100 + i, kKept[i].shape); !saved)
      d.wrong("save %s: %s", kKept[i].key, saved.what().c_str());
  }
}

// What a client does that is nowhere near a death.
void work(Scene& s, std::mt19937_64& random) {
  const std::string key = "survivor/" + std::to_string(random() % 4);
  const uint64_t seed = 1000 + random() % 1'000'000;
  const Shape shape{64 + random() % 6000, static_cast<uint32_t>(random() % 3), random() % 8 == 0 ? 200U : 0U};
  switch (random() % 8) {
    case 0: {
      const Status saved = put(s, key, seed, shape);
      if (!saved && saved.code() != Code::kExists && saved.code() != Code::kFull)
        s.wrong("survivor: save: %s", saved.what().c_str());
      break;
    }
    case 1: {
      const Status saved = put(s, key, seed, shape, {.overwrite = true});
      if (!saved && saved.code() != Code::kFull) s.wrong("survivor: overwrite: %s", saved.what().c_str());
      if (saved && get(s, key) != seed) s.wrong("survivor: %s is not what was saved", key.c_str());
      break;
    }
    case 2:
      (void)names(s).remove(key);
      break;
    case 3:
      if (here.board->leave_dead.load() == 0) (void)names(s).sweep();
      break;
    case 4:
      for (const std::string& each : names(s).keys("survivor/")) (void)get(s, each);
      break;
    default:
      // What is on disk needs room, and there is none where the pool is made full on purpose.
      (void)get(s, random() % 2 == 0 && expected->key[0] != 0 ? expected->key : key, here.board->tolerant.load() != 0);
  }
}

std::string while_stopped(Scene& d, int rounds) {
  auto report = store::check_catalogue(catalogue_fd, d.member->arena());
  if (!report) return report.status().what();
  if (!report->ok()) return "the catalogue's checker: " + report->first();
  if (Status saved = put(d, "others", 7, kMany3, {.overwrite = true}); !saved)
    return "others can't save: " + saved.what();
  if (get(d, "others") != 7 || !names(d).remove("others")) return "others can't load or remove what they saved";
  (void)names(d).sweep();
  if (expected->key[0] == 0) return "";
  const uint64_t found = get(d, expected->key);
  if (expected->contested == 0 && !may_be(found))
    return std::string(expected->key) + " stands for the value of seed " + std::to_string(found);
  if (rounds < 2) return "";
  // The same name, also against a claim.
  expected->contested = 1;
  if (Status saved = put(d, expected->key, kContested, kOne, {.overwrite = true}); !saved)
    return "others can't overwrite: " + saved.what();
  if (get(d, expected->key) != kContested) return "others can't load what they saved";
  if (!names(d).remove(expected->key)) return "others can't remove";
  return "";
}

std::string left_by(Scene& d, const Operation& operation) {
  // What could be loaded must not go when somebody sweeps, unless it was bound to the dead.
  auto entry = names(d).find(expected->key);
  const bool bound = entry && entry->owner != 0 && d.member->gone(entry->owner);
  const uint64_t before = get(d, expected->key);
  (void)names(d).sweep();
  (void)names(d)
      .sweep();  // an expired name that somebody died over stands again after the first, and goes in the second
  auto report = store::check_catalogue(catalogue_fd, d.member->arena(), true);
  if (!report) return report.status().what();
  if (!report->ok()) return "the catalogue's checker: " + report->first();
  if (report->marks != 0) return "a mark of the dead is left";
  for (size_t i = 0; i < std::size(kKept) && (operation.flags & kFresh) == 0; ++i) {
    if (get(d, kKept[i].key) != 100 + i) return std::string(kKept[i].key) + ", untouched, has changed";
  }
  if (expected->key[0] != 0) {
    const uint64_t found = get(d, expected->key);
    if (found != before && !bound)
      return std::string(expected->key) + " stood for the value of seed " + std::to_string(before) +
             " before a sweep, for " + std::to_string(found) + " after it";
    const bool well = expected->contested != 0
                          ? found == kMissing || found == kContested || found == kNew || may_be(found)
                          : (one_of(found, expected->before) && expected->phase != 2) ||
                                (one_of(found, expected->after) && expected->phase != 0 && expected->phase != 3);
    if (!well)
      return std::string(expected->key) + " stands for the value of seed " + std::to_string(found) + " in phase " +
             std::to_string(expected->phase);
  }
  (void)names(d).sweep_files();
  uint64_t listed = 0, with_file = 0;
  std::string wrong;
  for (uint32_t cell = 0, used = names(d).cells_used(); cell < used; ++cell) {
    const auto standing = store::StandingValue::of(names(d).use_of(cell).standing.load());
    const auto value = store::CellValue::of(names(d).word(cell).value.load());
    with_file += value.state != store::CellState::kFree && standing.life == value.life && standing.file != 0 ? 1 : 0;
  }
  if (const uint64_t files = spill_files(false); files != with_file)
    return std::to_string(files) + " files are left, of " + std::to_string(with_file) + " names";
  for (const std::string& key : names(d).keys("")) {
    ++listed;
    auto entry = names(d).find(key);
    if (!entry) {
      wrong = key + " is listed and not found";
      continue;
    }
    if (entry->owner != 0 && d.member->gone(entry->owner)) wrong = "a bound name of the dead is left: " + key;
    if (get(d, key) == kBroken) wrong = key + " is broken";
  }
  if (wrong.empty() && (listed != report->names || names(d).size() != report->names))
    wrong = std::to_string(listed) + " names are listed, " + std::to_string(report->names) + " are there";
  return wrong;
}

void remove_all(Scene& d) {
  for (const std::string& key : names(d).keys("")) {
    if (!names(d).remove(key)) d.wrong("%s can't be removed", key.c_str());
  }
}

std::string verify(Scene& d, const Operation& operation) {
  std::string wrong = left_by(d, operation);
  if (wrong.empty() && (operation.flags & kAdopts) != 0) wrong = startable(d, name);
  remove_all(d);
  (void)d.member->reap();
  (void)names(d).sweep_discarded(true);  // as the service does at its end
  auto report = store::check_catalogue(catalogue_fd, d.member->arena(), true);
  if (wrong.empty() && report && (!report->ok() || report->cells != 0))
    wrong = "all names were removed: " + std::to_string(report->cells) + " cells are left; " + report->first();
  if (wrong.empty() && spill_files(true) != 0) wrong = "all names were removed, and files are left";
  if (wrong.empty() && here.board->wrong[0] != 0) wrong = here.board->wrong;
  return wrong;
}

}  // namespace

// ---- names

const std::string& store_name() { return name; }

void open_store(Scene& driver) {
  static int sessions = 0;
  if (expected == nullptr) expected = make_shared_page<Expected>();
  directory = "/tmp/torchshm-points-XXXXXX";
  if (::mkdtemp(directory.data()) == nullptr) return driver.wrong("no directory for the service");
  ::setenv("XDG_RUNTIME_DIR", directory.c_str(), 1);
  (void)os::private_directory(service::directory(), -1);
  name = "points-" + std::to_string(::getpid()) + "-" + std::to_string(++sessions);
  auto made = store::Catalogue::create(*driver.member, name, {.place = service::place()});
  if (!made) return driver.wrong("no catalogue: %s", made.status().what().c_str());
  driver.names = std::shared_ptr<store::Catalogue>(made.take());
  auto files = store::SpillDirectory::make(spill_place(), name, driver.member->pool_id(), false, -1);
  if (!files) return driver.wrong("no spill directory: %s", files.status().what().c_str());
  spill_fd = (*files)->fd();
  driver.names->use(files.take());
  driver.names->set_directory(spill_place());
  catalogue_fd = driver.names->fd();
}

store::Catalogue& names(Scene& s) {
  if (s.names == nullptr) {
    auto attached = store::Catalogue::attach(*s.member, os::duplicate(catalogue_fd).take());
    if (!attached) {
      s.wrong("no catalogue: %s", attached.status().what().c_str());
      ::_exit(1);
    }
    s.names = std::shared_ptr<store::Catalogue>(attached.take());
    s.names->use(join_directory(s));
  }
  return *s.names;
}

const std::string& spill_place() {
  static std::string place;
  return place = directory + "/spill";
}

std::unique_ptr<store::SpillDirectory> join_directory(Scene& s) {
  auto joined = store::SpillDirectory::join(os::duplicate(spill_fd).take(), s.member->pool_id());
  if (!joined) {
    s.wrong("no spill directory: %s", joined.status().what().c_str());
    ::_exit(1);
  }
  return joined.take();
}

Status put(Scene& s, const std::string& key, uint64_t seed, const Shape& shape, const store::SaveOptions& options) {
  std::vector<uint32_t> blocks;
  Status status;
  for (uint32_t i = 0; i < shape.blocks && status; ++i) {
    auto view = s.member->allocate(shape.bytes, true);
    if (!view) {
      status = std::move(view.status());
      break;
    }
    fill({view->block, pool::Mode::kReadWrite, view->data, shape.bytes, seed + i});
    blocks.push_back(view->block);
  }
  if (status) {
    std::string text =
        std::to_string(seed) + " " + std::to_string(shape.bytes) + " " + std::to_string(shape.blocks) + " ";
    status = names(s).save(key, text + std::string(shape.padding, '.'), blocks, options);
  }
  for (const uint32_t block : blocks) s.member->release(block, pool::Mode::kReadWrite);
  return status;
}

uint64_t get(Scene& s, const std::string& key, bool may_be_full) {
  for (int attempt = 0; attempt < 1000; ++attempt) {
    auto entry = names(s).find(key);
    if (!entry && entry.code() == Code::kMissing) return kMissing;
    if (!entry) {
      s.wrong("%s: %s", key.c_str(), entry.status().what().c_str());
      return kBroken;
    }
    if (entry->spilled) {
      const Status restored = names(s).restore(key, false);
      if (restored) continue;
      if (may_be_full && restored.code() == Code::kFull) return kMissing;
      s.wrong("%s: %s", key.c_str(), restored.what().c_str());
      return kBroken;
    }
    uint64_t seed = 0, bytes = 0;
    uint32_t blocks = 0;
    if (std::sscanf(entry->text.c_str(), "%lu %lu %u", &seed, &bytes, &blocks) != 3 || entry->blocks.size() != blocks) {
      s.wrong("%s: %zu blocks and the description %s", key.c_str(), entry->blocks.size(), entry->text.c_str());
      return kBroken;
    }
    bool gone = false;
    for (uint32_t i = 0; i < blocks && !gone; ++i) {
      auto view = s.member->attach(entry->blocks[i].block, entry->blocks[i].generation, pool::Mode::kReadWrite);
      gone = !view;
      if (!view && view.code() != Code::kStale) {
        s.wrong("%s: %s", key.c_str(), view.status().what().c_str());
        return kBroken;
      }
      if (!view) continue;
      const bool whole = intact({view->block, pool::Mode::kReadWrite, view->data, bytes, seed + i});
      s.member->release(view->block, pool::Mode::kReadWrite);
      if (!whole) {
        s.wrong("%s: block %u has other bytes", key.c_str(), entry->blocks[i].block);
        return kBroken;
      }
    }
    if (!gone) return seed;  // else removed or replaced meanwhile
  }
  s.wrong("%s changes too often", key.c_str());
  return kBroken;
}

void expect(const std::string& key, std::initializer_list<uint64_t> before, std::initializer_list<uint64_t> after) {
  const auto set = [](uint64_t(&to)[kSeeds], std::initializer_list<uint64_t> from) {
    for (size_t i = 0; i < kSeeds; ++i) to[i] = from.begin()[std::min(i, from.size() - 1)];
  };
  set(expected->before, before);
  set(expected->after, after);
  std::strncpy(expected->key, key.c_str(), sizeof expected->key - 1);
}

bool may_be(uint64_t seed) { return one_of(seed, expected->before) || one_of(seed, expected->after); }

// ---- the program

const std::vector<Operation>& operations() {
  static const auto* all = [] {
    auto* made = new std::vector<Operation>;
    add_names(*made);
    add_spill(*made);
    add_service(*made);
    return made;
  }();
  return *all;
}

const Subject& subject() {
  static const auto* store = new Subject{
      .name = "store_points",
      .program = "torchshm_store_points",
      .counts =
          [](std::string_view room, std::string_view file, std::string_view point) {
            // Of persistent stores: tests/cpp/store_file_test.cc goes through all of them.
            const bool in_file = file == "backing.cc" || point.substr(0, 8) == "reserve." || point == "serve.written";
            return !in_file &&
                   (room == "store" || room == "service" || file == "socket.cc" || point == "os.open_memfd");
          },
      .open = open_store,
      .close =
          [](Scene& d) {
            remove_all(d);
            std::filesystem::remove_all(directory);
          },
      .set_up = set_up,
      .work = work,
      .get_ready = [](Scene& s) { (void)names(s); },
      .recover = [](Scene& s) { (void)names(s).sweep(); },
      .while_stopped = while_stopped,
      .verify = verify,
  };
  return *store;
}

}  // namespace torchshm::torture
