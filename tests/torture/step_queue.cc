#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "step_operations.h"

namespace torchshm::torture {

using pool::Mode;
using pool::Queue;

namespace {

constexpr unsigned char kMessage = 0x6b;
constexpr uint64_t kSmall = 700, kLarge = 30000;  // in a parcel with others, in a block of its own
constexpr uint64_t kMaxsize = 4;
constexpr uint64_t kCells = 256;  // of a segment, for so small a maxsize

void put(Queue& queue, uint64_t bytes) {
  auto message = queue.reserve(bytes);
  if (!message) return;  // no room, as random combinations may have it
  std::memset(message->data, kMessage, bytes);
  const auto done = queue.publish(*message);
  if (!done || !*done) queue.cancel(*message);
}

// A message that refers to a block of its own.
void put_array(Scene& s, Queue& queue) {
  auto view = s.self->allocate(9000, false);
  if (!view) return;
  std::memset(view->data, kMessage, 9000);
  {
    Queue::Busy busy(queue);
    auto handle = s.self->issue(view->block, &queue.ref());
    if (handle) {
      auto message = queue.reserve(kSmall, {&*handle, 1});
      busy.end();
      bool sent = false;
      if (message) {
        std::memset(message->data, kMessage, kSmall);
        const auto done = queue.publish(*message);
        sent = done && *done;
        if (!sent) queue.cancel(*message);
      }
      if (!sent) s.self->give_up(*handle);
    }
  }
  s.self->release(view->block, Mode::kReadWrite);
}

void take(Queue& queue) {
  auto message = queue.take();
  if (!message || !*message) return;
  queue.drop_rest(**message);
  queue.finish(**message);
  (void)queue.task_done();
}

// A queue that the survivor has, with what `fill` does to it; the other process gets a handle of it.
void make(Scene& s, void (*fill)(Scene&, Queue&) = nullptr) {
  if (!s.queue) {
    auto made = Queue::create(*s.survivor, kMaxsize);
    if (!made) return;
    s.queue = made.take();
  }
  pool::Member* const self = std::exchange(s.self, s.survivor.get());
  if (fill != nullptr) fill(s, *s.queue);
  s.self = self;
  if (const auto handle = s.queue->handle()) s.handle = *handle;
}

void open(Scene& s) {
  auto opened = Queue::open(*s.self, s.handle);
  if (opened) s.mine = opened.take();
}

void open_and_warm(Scene& s) {
  open(s);
  if (!s.mine) return;
  put(*s.mine, kSmall);
  take(*s.mine);
}

Hook with(void (*act)(Scene&, Queue&)) {
  return [act](Scene& s) {
    if (s.mine) act(s, *s.mine);
  };
}

// All but the last cell of the first segment has been used.
void wear(Scene&, Queue& queue) {
  for (uint64_t i = 0; i + 1 < kCells; ++i) {
    put(queue, 64);
    take(queue);
  }
}

std::string take_all(Queue& queue) {
  std::string wrong;
  for (;;) {
    auto message = queue.take();
    if (!message) return wrong + "; the queue: " + message.status().what();
    if (!*message) return wrong;
    const std::byte* data = (*message)->data;
    if (!std::all_of(data, data + (*message)->length, [](std::byte b) { return b == std::byte{kMessage}; }))
      wrong += "; a message of the queue has other bytes";
    queue.drop_rest(**message);
    queue.finish(**message);
  }
}

// What is out for the queue, but for its segments.
uint64_t kept(const Scene& s) {
  uint64_t n = 0;
  const pool::Arena& arena = s.survivor->arena();
  const pool::QueueRef& ref = s.queue->ref();
  for (uint32_t i = 0; i < arena.tickets_used(); ++i) {
    const auto ticket = pool::TicketValue::of(arena.ticket(i).value.load());
    if (!ticket.of_queue() || ticket.second != ref.block) continue;
    const auto extent = arena.extent(ticket.block);
    uint64_t magic = 0;
    if (extent) std::memcpy(&magic, arena.data() + extent->offset, sizeof magic);
    n += magic != pool::kSegmentMagic ? 1 : 0;
  }
  return n;
}

}  // namespace

std::vector<Operation> queue_operations() {
  return {
      {.name = "queue, create and end",
       .family = "queue",
       .act =
           [](Scene& s) {
             auto made = Queue::create(*s.self, kMaxsize);
             if (made) put(**made, kSmall);
           }},
      {.name = "queue, open", .family = "queue", .before = [](Scene& s) { make(s); }, .act = open},
      {.name = "queue, put the first",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) { put(queue, kSmall); })},
      {.name = "queue, put into a parcel",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open_and_warm,
       .act = with([](Scene&, Queue& queue) { put(queue, kSmall); })},
      {.name = "queue, put a large one",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open_and_warm,
       .act = with([](Scene&, Queue& queue) { put(queue, kLarge); })},
      {.name = "queue, put an array",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open_and_warm,
       .act = with(put_array)},
      {.name = "queue, put into a full one",
       .family = "queue",
       .before =
           [](Scene& s) {
             make(s, [](Scene&, Queue& queue) {
               while (!queue.full()) put(queue, kSmall);
             });
           },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) {
         auto message = queue.reserve(kSmall);
         if (!message) return;
         std::memset(message->data, kMessage, kSmall);
         const auto done = queue.publish(*message);
         if (done && *done) return;
         queue.wait_for_room(*message, 0);
         const auto again = queue.publish(*message);
         if (!again || !*again) queue.cancel(*message);
       })},
      {.name = "queue, put into the next segment",
       .family = "queue",
       .before = [](Scene& s) { make(s, wear); },
       .prepare = open_and_warm,
       .act = with([](Scene&, Queue& queue) { put(queue, kSmall); })},
      {.name = "queue, take",
       .family = "queue",
       .before = [](Scene& s) { make(s, [](Scene&, Queue& queue) { put(queue, kSmall), put(queue, kSmall); }); },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) { take(queue); })},
      {.name = "queue, take the last of a parcel",
       .family = "queue",
       .before = [](Scene& s) { make(s, [](Scene&, Queue& queue) { put(queue, kSmall), queue.close_parcel(); }); },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) { take(queue); })},
      {.name = "queue, take an array",
       .family = "queue",
       .before = [](Scene& s) { make(s, put_array); },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) { take(queue); })},
      {.name = "queue, take and keep for later",
       .family = "queue",
       .before = [](Scene& s) { make(s, put_array); },
       .prepare = open,
       .act = with([](Scene& s, Queue& queue) {
         auto message = queue.take();
         if (!message || !*message) return;
         queue.keep_for_later(**message);
         const auto later = s.messages();
         queue.finish(**message);
         for (const auto& handle : later) s.self->give_up(handle);
       })},
      {.name = "queue, close",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open_and_warm,
       .act = [](Scene& s) { s.mine.reset(); }},
      {.name = "queue, give back what the dead left",
       .family = "queue",
       .before = [](Scene& s) { make(s, [](Scene&, Queue& queue) { put(queue, kLarge), put(queue, kSmall); }); },
       .prepare = open_and_warm,
       .between =
           [](Scene& s) {
             make(s);
             live_and_die(s, [](Scene& v) {
               open(v);
               if (!v.mine) return;
               (void)v.mine->take();
               (void)v.mine->reserve(kLarge);
             });
             (void)s.survivor->reap();
           },
       .act = with([](Scene&, Queue& queue) { queue.salvage(); })},
      {.name = "queue, the flag",
       .family = "queue",
       .before = [](Scene& s) { make(s); },
       .prepare = open,
       .act = with([](Scene&, Queue& queue) { queue.set_flag(true), queue.wait(Queue::For::kFlag, 1000); })},
  };
}

std::string verify_queue(Scene& s) {
  if (!s.queue) return {};
  Queue& queue = *s.queue;
  std::string wrong = take_all(queue);
  put(queue, kSmall), put(queue, kLarge);
  if (queue.size() != 2) {
    // Without room for them, perhaps.
    auto message = queue.reserve(kSmall);
    if (message) wrong += "; the queue does not go on", queue.cancel(*message);
  }
  wrong += take_all(queue);
  queue.close_parcel();
  // Of a parcel that the dead have read a part of, what is left is found after a pause.
  constexpr int kAttempts = 400;
  for (int i = 0; kept(s) != 0 && i < kAttempts; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    queue.salvage(1'000'000);
  }
  if (const uint64_t left = kept(s); left != 0)
    wrong += "; the queue keeps " + std::to_string(left) + " blocks of the dead";
  s.queue.reset();
  return wrong;
}

}  // namespace torchshm::torture
