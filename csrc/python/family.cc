#include "python/family.h"

#include <algorithm>

#include "python/errors.h"

namespace torchshm::python {
namespace {

pool::Member* current = nullptr;
std::vector<pool::Member*> former;  // rarely more than one

}  // namespace

Settings& settings() {
  static Settings values;
  return values;
}

bool Batch::refer(pool::Member& member, const pool::Member::Found& found, uint64_t bytes, Kind kind) {
  // A small part would keep all of it, where a copy of the part is quicker than new pages.
  if (kind != Kind::kStorage && bytes < found.length / 2) return false;
  for (const Referred& other : to_copy) {
    // Storages that were borrowed are torch's own when they come back from the first pickle.
    if (other.member == &member && other.block == found.block &&
        (kind == Kind::kArray || other.kind == Kind::kBorrowed)) {
      return false;
    }
  }
  referred.push_back({&member, found.block, kind});
  return true;
}

bool Batch::look() {
  std::sort(referred.begin(), referred.end(),
            [](const Referred& a, const Referred& b) { return a.place() < b.place(); });
  for (size_t i = 0; i < referred.size(); ++i) {
    const Referred& now = referred[i];
    if (now.kind == Kind::kStorage) continue;
    const bool twice = (i > 0 && referred[i - 1].place() == now.place()) ||
                       (i + 1 < referred.size() && referred[i + 1].place() == now.place());
    if (twice || now.member->objects(now.block) > 0) to_copy.push_back(now);
  }
  referred.clear();
  return !to_copy.empty();
}

Scope& scope() {
  thread_local Scope mine;
  return mine;
}

Result<pool::Handle> issue(pool::Member& member, uint32_t block) {
  Scope& now = scope();
  if (now.queue == nullptr || now.queue_member != &member || now.sharing) return member.issue(block);
  auto handle = member.issue(block, now.queue);
  if (handle) now.in_message.push_back(*handle);
  return handle;
}

pool::Member* member() { return current; }
void set_member(pool::Member* member) {
  std::erase(former, member);
  if (current != nullptr && current != member) former.push_back(current);
  current = member;
}

void refer_to(pool::Member* member) {
  if (member != current && std::find(former.begin(), former.end(), member) == former.end()) former.push_back(member);
}

const std::vector<pool::Member*>& former_members() { return former; }

pool::Member* former_member(const void* address) {
  for (pool::Member* member : former) {
    if (member->arena().locate(address)) return member;
  }
  return nullptr;
}

pool::Member* member_of(uint64_t pool_id) {
  if (current != nullptr && current->pool_id() == pool_id) return current;
  if (pool::Member* known = pool::find_pool(pool_id)) return known;
  PyObject* family = PyImport_ImportModule("torchshm._family");
  PyObject* joined =
      family == nullptr ? nullptr : PyObject_CallMethod(family, "find", "K", static_cast<unsigned long long>(pool_id));
  Py_XDECREF(family);
  if (joined == nullptr) return nullptr;
  Py_DECREF(joined);
  if (pool::Member* known = pool::find_pool(pool_id)) return known;
  (void)raise(Status(Code::kForeign, ""));
  return nullptr;
}

}  // namespace torchshm::python
