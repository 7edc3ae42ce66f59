// Who touched what when: an access that nothing orders after another thread's, where one of the two writes, is a race.
#include "machine.h"

namespace ptx {
namespace {

// Whether everything that `thread` did up to `time` comes before what this lane does now.
bool before_now(const Warp& w, int lane, uint32_t thread, uint32_t time, Shadow::Readers how = Shadow::ONE_THREAD) {
  const uint32_t mine = w.thread(lane), threads = w.block->launch->threads;
  if (how == Shadow::ONE_THREAD && thread == mine) return true;
  if (how == Shadow::MANY_BLOCKS) return false;
  if ((thread - 1) / threads != w.block->number) {
    const auto sees = [&](const View& view) {
      const auto found = view.find((thread - 1) / threads);
      return found != view.end() && found->second >= time;
    };
    const auto own = w.block->acquired.find(mine);
    return sees(w.block->view) || (own != w.block->acquired.end() && sees(own->second));
  }
  if (time <= w.block->released) return true;
  return how != Shadow::ONE_BLOCK && (thread - 1) / LANES == (mine - 1) / LANES && time <= w.synced;
}

// In shared memory a failure. In global memory noted: threads that hold copies of an element may read what another has
// written by then and throw it away, so whether it matters is seen by running everything in the opposite order.
void race(const Warp& w, int lane, uint32_t other, const char* does, const char* did, const char* where, bool shared) {
  const uint32_t threads = w.block->launch->threads, block = (other - 1) / threads;
  std::string who = "thread " + std::to_string((other - 1) % threads);
  if (block != w.block->number) who += " of block " + std::to_string(block);
  const std::string what = std::string{"race: "} + does + " " + where + " that " + who + " " + did;
  if (shared) fail_lane(w, lane, what + " with no barrier in between");
  auto& hazards = w.block->launch->hazards;
  if (hazards.size() < 4) hazards.push_back(text_of(w, lane) + what + " unordered");
}

}  // namespace

void touch_read(Warp& w, int lane, Shadow& shadow, uint64_t at, uint64_t size, const char* where, bool async) {
  const uint32_t mine = w.thread(lane), now = w.block->launch->time;
  for (uint64_t k = at; k < at + size; ++k) {
    Shadow::Cell& cell = shadow.cells[k];
    if (cell.pending != 0) fail_lane(w, lane, std::string{"reads "} + where + " that a cp.async is still writing");
    if (cell.writer != 0 && !before_now(w, lane, cell.writer, cell.written))
      race(w, lane, cell.writer, "reads", "wrote", where, shadow.shared);
    if (async && cell.registers && cell.writer != 0) {
      const uint32_t from = (cell.writer - 1) % w.block->launch->threads / LANES;
      if (w.fenced < cell.written && w.block->warps[from].fenced < cell.written)
        fail_lane(w, lane, "wgmma reads what was stored with no fence.proxy.async in between");
    }
    if (cell.reader == 0 || before_now(w, lane, cell.reader, cell.read, cell.readers)) {
      cell.readers = Shadow::ONE_THREAD;
    } else if (cell.reader != mine || cell.readers != Shadow::ONE_THREAD) {
      const uint32_t threads = w.block->launch->threads;
      const Shadow::Readers apart = (cell.reader - 1) / threads != w.block->number    ? Shadow::MANY_BLOCKS
                                    : (cell.reader - 1) / LANES != (mine - 1) / LANES ? Shadow::ONE_BLOCK
                                                                                      : Shadow::ONE_WARP;
      cell.readers = std::max(cell.readers, apart);
    }
    cell.reader = mine;
    cell.read = now;
  }
}

void touch_write(
    Warp& w, int lane, Shadow& shadow, uint64_t at, const uint8_t* old, const uint8_t* bytes, uint64_t size,
    const char* where, bool async
) {
  const uint32_t mine = w.thread(lane), now = w.block->launch->time;
  for (uint64_t k = 0; k < size; ++k) {
    Shadow::Cell& cell = shadow.cells[at + k];
    if (cell.pending != 0) fail_lane(w, lane, std::string{"writes "} + where + " that a cp.async is still writing");
    // Several threads may write the same value, as Triton's copies of one element do.
    if (cell.writer != 0 && (bytes == nullptr || old[k] != bytes[k]) && !before_now(w, lane, cell.writer, cell.written))
      race(w, lane, cell.writer, "writes", "wrote", where, shadow.shared);
    if (cell.reader != 0 && !before_now(w, lane, cell.reader, cell.read, cell.readers))
      race(w, lane, cell.reader, "writes", "read", where, shadow.shared);
    cell.writer = mine;
    cell.written = now;
    cell.registers = !async;
    cell.reader = 0;
  }
}

}  // namespace ptx
