// Stores for tests: a pool with a catalogue, joined by as many as a test likes, and values that show whether they are whole.
#pragma once

#include <cstring>
#include <memory>
#include <string>

#include "processes.h"
#include "store/catalogue.h"
#include "store/catalogue_check.h"

namespace torchshm::tests {

struct Store {
  std::unique_ptr<pool::Member> member;
  std::unique_ptr<store::Catalogue> catalogue;
  store::Catalogue* operator->() const { return catalogue.get(); }
};

inline Store fresh_store(uint64_t limit = uint64_t{256} << 20) {
  Store store{fresh_pool(limit), nullptr};
  auto catalogue = store::Catalogue::create(*store.member, "test", {});
  EXPECT_TRUE(catalogue.ok()) << catalogue.status().what();
  store.catalogue = catalogue.take();
  return store;
}

inline Store join(Store& other) {
  Store store{join(*other.member), nullptr};
  auto catalogue = store::Catalogue::attach(*store.member, os::duplicate(other->fd()).take());
  EXPECT_TRUE(catalogue.ok()) << catalogue.status().what();
  store.catalogue = catalogue.take();
  return store;
}

// Saves a block filled with a byte, and lets go of it.
inline Status save_filled(Store& store, const std::string& key, uint8_t byte, uint64_t bytes = 5000,
                          const store::SaveOptions& options = {}) {
  auto view = store.member->allocate(bytes, true);
  if (!view) return std::move(view.status());
  std::memset(view->data, byte, bytes);
  Status saved = store->save(key, std::string(1, static_cast<char>(byte)), {view->block}, options);
  store.member->release(view->block, pool::Mode::kReadWrite);
  return saved;
}

// The byte that a name's block is filled with; -1 when there is no such name, -2 when it is not whole.
inline int loaded(Store& store, const std::string& key, uint64_t bytes = 5000) {
  for (;;) {
    auto entry = store->find(key);
    if (!entry) return -1;
    if (entry->blocks.size() != 1 || entry->text.size() != 1) return -2;
    auto view = store.member->attach(entry->blocks[0].block, entry->blocks[0].generation, pool::Mode::kRead);
    if (!view) continue;  // removed meanwhile
    const auto byte = static_cast<uint8_t>(entry->text[0]);
    bool whole = true;
    for (uint64_t i = 0; i < bytes; i += 97) whole = whole && view->data[i] == std::byte{byte};
    store.member->release(view->block, pool::Mode::kRead);
    return whole ? byte : -2;
  }
}

// What must hold when nobody is at work. Empty when it does.
inline std::string unsound(Store& store) {
  auto report = store::check_catalogue(store->fd(), store.member->arena(), true);
  if (!report) return report.status().what();
  if (!report->ok()) return report->first();
  const uint64_t listed = store->keys("").size();
  if (listed != report->names || store->size() != report->names)
    return std::to_string(listed) + " names are listed, " + std::to_string(store->size()) + " counted, and there are " +
           std::to_string(report->names);
  return "";
}

}  // namespace torchshm::tests
