// What lies where in the blocks of a queue, byte for byte.
//
// Shared: everything declared here. Structs are trivially copyable, and hold block numbers and offsets, never pointers.
// tests/cpp/queue_test.cc pins the bytes; kQueueLayout changes with them.
//
//   queue block:    QueueHeader | AtomicPair x kQueueSegments | QueueParty x kMaxLeases
//   segment block:  SegmentHeader | AtomicPair x cells
//   parcel block:   ParcelHeader | (MessageHeader, MessageTicket x tickets, bytes) ...
//
// Positions count messages from 0 and never come back. Position p is cell p % cells of segment p / cells, and segment s is entry
// s % kQueueSegments of the table. A cell goes up only:
//   lo < 2p + 1   nothing has been put at p yet
//   lo = 2p + 1   a message; hi says where its bytes are
//   lo > 2p + 1   it has been taken; the cell waits for a later position
#pragma once

#include <atomic>
#include <cstdint>

#include "pool/layout.h"
#include "pool/pair.h"

namespace torchshm::pool {

constexpr uint64_t kQueueMagic = 0x4555455551485354;    // "TSHQUEUE"
constexpr uint32_t kParcelMagic = 0x4c435250;           // "PRCL"
constexpr uint64_t kSegmentMagic = 0x544e454d47455351;  // "QSEGMENT"
constexpr uint32_t kQueueSegments = 2048;               // in use at once
constexpr uint32_t kMostCells = 2048;                   // of a segment; so 4,194,304 messages can wait in a queue
constexpr uint32_t kFewestCells = 256;                  // a block of 4 KiB
constexpr uint64_t kParcel = uint64_t{64} << 10;     // bytes; messages above a quarter of it have a block of their own
constexpr uint64_t kOpenParcel = uint64_t{1} << 32;  // while its sender puts messages in
constexpr uint64_t kMessageUnit = 64;

// Where somebody may sleep. `waiting` is not zero while somebody may; who wakes sets it back when nobody was there.
struct QueueBell {
  std::atomic<uint32_t> rung;
  std::atomic<uint32_t> waiting;
};

struct alignas(64) QueueHeader {
  uint64_t magic;
  uint32_t layout;
  uint32_t cells;              // of a segment; a power of two
  uint64_t maxsize;            // 0: no bound
  std::atomic<uint32_t> flag;  // of an event, which is a queue without messages
  alignas(64)
      std::atomic<uint64_t> tail;  // no position below is without a message; the first one without it, or a step before
  alignas(64) std::atomic<uint64_t> head;  // all positions below are taken; the first one that is not, or a step before
  alignas(64) std::atomic<uint64_t> done;  // calls of task_done()
  QueueBell arrived, left, finished;
};

// An entry of the table. lo: segment + 1; hi: block + 1, or 0 when its block has gone to another entry.
// A cell. lo: above; hi: block << 32 | offset of the message in units of kMessageUnit.

// What a lease is doing with the queue, for whoever looks for what the dead have left (queue_salvage.cc).
struct alignas(16) QueueParty {
  std::atomic<uint64_t>
      busy;  // incarnation:40 count:24. Messages in hand: between reserve() and publish(), or take() and finish()
  std::atomic<uint64_t> parked;  // a cell's `hi`: a message of it that is not counted while it waits for room, or 0
};

struct alignas(64) SegmentHeader {
  uint64_t magic;
};

struct alignas(64) ParcelHeader {
  uint32_t magic;
  uint32_t ticket;  // that keeps the block
  uint64_t nonce;
  uint64_t generation;
  std::atomic<uint64_t> filler;  // who fills it (Member::identity), or 0
  std::atomic<uint64_t> left;  // messages that have not been read, + kOpenParcel - those put in so far while it is open
};

struct alignas(64) MessageHeader {
  uint64_t length;   // bytes
  uint64_t tickets;  // that are out for blocks which the message refers to
};

// nonce:40 index:24
using MessageTicket = uint64_t;

static_assert(sizeof(QueueHeader) == 256 && sizeof(ParcelHeader) == 64 && sizeof(MessageHeader) == 64 &&
              sizeof(SegmentHeader) == 64 && sizeof(QueueParty) == 16);
static_assert(kTickets <= 1u << 24);
constexpr uint32_t kQueueLayout =
    static_cast<uint32_t>(sizeof(QueueHeader) * 2654435761u ^ kQueueSegments * 31u ^ sizeof(ParcelHeader) * 40503u ^
                          sizeof(MessageHeader) ^ sizeof(QueueParty) * 2246822519u) +
    2;
constexpr uint64_t kQueueTableAt = sizeof(QueueHeader);
constexpr uint64_t kQueuePartiesAt = kQueueTableAt + kQueueSegments * sizeof(AtomicPair);
constexpr uint64_t kQueueBytes = kQueuePartiesAt + kMaxLeases * sizeof(QueueParty);
// Leases whose slots are next to each other have cache lines of their own.
constexpr uint32_t party_index(uint32_t slot) { return slot % (kMaxLeases / 4) * 4 + slot / (kMaxLeases / 4); }

}  // namespace torchshm::pool
