// Names in a trial: values that say what they must contain, and what the name that an operation is about may stand for afterwards.
//
// The expectations are one anonymous shared page, made before the first fork; an operation's process writes them before it begins. They
// are no part of a store. When that process dies here: what it wrote last says how far it had come.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "points_scene.h"
#include "store/catalogue.h"
#include "store/spill_file.h"

namespace torchshm::torture {

constexpr uint64_t kMissing = 0, kBroken = ~uint64_t{0};  // in the place of a seed
constexpr uint64_t kOld = 11, kNew = 22, kRivals = 33, kContested = 44;

struct Shape {
  uint64_t bytes = kSmallBytes;  // of each block
  uint32_t blocks = 1;
  uint32_t padding = 0;  // bytes more in the description
};
constexpr Shape kOne{}, kMany3{4096, 3, 300}, kBig{kLargeBytes, 1, 0}, kText{0, 0, 0};

// What this process knows of the session's store; the driver's makes it.
void open_store(Scene& driver);
const std::string& store_name();
store::Catalogue& names(Scene& s);
const std::string& spill_place();
std::unique_ptr<store::SpillDirectory> join_directory(Scene& s);

Status put(Scene& s, const std::string& key, uint64_t seed, const Shape& shape, const store::SaveOptions& options = {});
// The seed of the value, kMissing, or kBroken after saying why to Scene::wrong(). may_be_full: no room for what is on disk is no wrong.
uint64_t get(Scene& s, const std::string& key, bool may_be_full = false);

constexpr uint32_t kBoundThere = 262144;  // a flag of operations: the driver has bound the name "there"

constexpr size_t kSeeds = 4;
struct Expected {
  char key[32];  // empty: the operation is about none
  uint64_t before[kSeeds], after[kSeeds];
  std::atomic<uint32_t> phase;      // 0: not begun, 1: begun, 2: done, 3: failed and said so
  std::atomic<uint32_t> contested;  // the driver has changed the name meanwhile
  std::atomic<uint32_t> refused;    // a client was told that it can't be served, and why
};
extern Expected* expected;

// For the end: one of `before` unless the operation came to its end, one of `after` unless it failed. Terminated by what is left out.
void expect(const std::string& key, std::initializer_list<uint64_t> before, std::initializer_list<uint64_t> after);
// Of one that may have been killed anywhere, or not.
bool may_be(uint64_t seed);

void add_names(std::vector<Operation>& all);
void add_spill(std::vector<Operation>& all);
void add_service(std::vector<Operation>& all);
// Empty, or why no service can be started for that name, or does not answer.
std::string startable(Scene& driver, const std::string& name);

}  // namespace torchshm::torture
