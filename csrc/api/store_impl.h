// What a torchshm::Store is: a catalogue, its pool and, after start(), its service. Files that open this one: store.cc (the store itself),
// saving.cc, loading.cc, locks.cc.
//
// Private to the process. Thread safety: as Store, all of it from any thread.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "api/errors.h"
#include "api/opener.h"
#include "api/values.h"
#include "service/server.h"
#include "store/catalogue.h"
#include "torchshm/store.h"

namespace torchshm {

constexpr std::chrono::milliseconds kRoomNap{5};  // while others may make room
constexpr uint64_t kNap = 50'000'000;             // ns; a holder or maker that dies rings no bell

struct Store::Impl {
  std::string name;
  pool::Member* member = nullptr;
  std::shared_ptr<store::Catalogue> catalogue;
  bool took_over = false;
  std::mutex ending;  // guards server's end
  std::shared_ptr<service::Server> server;

  std::shared_ptr<service::Server> service() {
    const std::lock_guard held(ending);
    return server;
  }

  // A block with `bytes` uninitialised bytes.
  pool::Member::View allocate(uint64_t bytes, bool in_the_making);

  void save(std::string_view key, const Array& given, const char* face, const SaveOptions& options);

  // Brings a spilled value back, if it is one.
  void restore(std::string_view key);
  // What the name stands for, once it is there.
  store::Entry find(std::string_view key, uint64_t timeout);

  // Puts up the mark of the process that makes a name. False when somebody else has.
  bool mark(const std::string& name);
  void wait_for_maker(std::string_view key, const std::string& mark, uint32_t bell, uint64_t timeout, uint64_t until);

 private:
  // What is to be saved: a range of a block, held, and the handle it goes by.
  struct Placed {
    pool::Handle handle;
    uint64_t offset = 0;
    std::shared_ptr<void> hold;
  };
  Placed place(const pool::Member::View& view, uint64_t offset);
  // Where it lies already; nothing when it has to be copied.
  std::optional<Placed> refer(const std::byte* low, uint64_t length);
  template <class F>
  Placed copy(uint64_t length, F fill);
  std::string wire_of(const Array& array, const api::TypeRow& row, const Placed& placed, int64_t offset);
  void name_it(std::string_view key, const std::string& text, const std::vector<uint32_t>& blocks,
               const store::SaveOptions& how);
};

}  // namespace torchshm
