// Loads, stores, asynchronous copies, and what keeps watch over them: bounds, alignment, races, copies that are still
// on their way.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

std::string bytes_text(uint64_t size) { return std::to_string(size) + (size == 1 ? " byte" : " bytes"); }

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

Region& region_of(Warp& w, int lane, uint64_t address) {
  auto& regions = w.block->launch->regions;
  const uint64_t index = address >> 40;
  if (index == 0 || index > regions.size()) fail_lane(w, lane, "access to global memory that is no array");
  return regions[index - 1];
}

uint8_t* global_bytes(Warp& w, int lane, uint64_t address, uint64_t size, Region*& region, uint64_t& at) {
  if (w.block->launch->overlaps && !(w.waited >> lane & 1))
    fail_lane(w, lane, "access to global memory before griddepcontrol.wait");
  region = &region_of(w, lane, address);
  at = address - region->base;
  if (at > region->size || size > region->size - at)
    fail_lane(
        w, lane,
        "access of " + bytes_text(size) + " at byte " + std::to_string(static_cast<int64_t>(at)) + " of " +
            region->name + ", which has " + std::to_string(region->size)
    );
  if (address % size != 0)
    fail_lane(w, lane, "access of " + bytes_text(size) + " to " + region->name + " is misaligned");
  if (region->allowed != nullptr && std::memchr(region->allowed + at, 0, size) != nullptr)
    fail_lane(w, lane, "access between the elements of " + region->name + ", at byte " + std::to_string(at));
  return region->data + at;
}

void read_global(Warp& w, int lane, uint64_t address, uint64_t size, void* to) {
  Region* region;
  uint64_t at;
  const uint8_t* from = global_bytes(w, lane, address, size, region, at);
  touch_read(w, lane, *region->shadow, region->shadow_offset + at, size, region->name.c_str());
  std::memcpy(to, from, size);
}

void write_global(Warp& w, int lane, uint64_t address, uint64_t size, const void* from) {
  Region* region;
  uint64_t at;
  uint8_t* to = global_bytes(w, lane, address, size, region, at);
  touch_write(
      w, lane, *region->shadow, region->shadow_offset + at, to, static_cast<const uint8_t*>(from), size,
      region->name.c_str()
  );
  std::memcpy(to, from, size);
}

uint64_t address_of(Warp& w, const Instruction& i, int operand, int lane) {
  return any_register(w, i.o[operand], lane) + static_cast<uint64_t>(i.o[operand + 1]);
}

// ld: COUNT values of type T, extended to their registers' widths by the kind of T.
template <class T, int COUNT, bool SHARED>
void load(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      T values[COUNT];
      const uint64_t address = address_of(w, i, COUNT, lane);
      if (SHARED)
        read_shared(w, lane, address, sizeof values, values);
      else
        read_global(w, lane, address, sizeof values, values);
      for (int k = 0; k < COUNT; ++k)
        set_any_register(w, i.o[k], lane, static_cast<uint64_t>(static_cast<int64_t>(values[k])));
    }
}

template <class T, int COUNT, bool SHARED>
void store(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      T values[COUNT];
      for (int k = 0; k < COUNT; ++k)
        values[k] = static_cast<T>(any_register(w, i.o[2 + k], lane));
      const uint64_t address = address_of(w, i, 0, lane);
      if (SHARED)
        write_shared(w, lane, address, sizeof values, values);
      else
        write_global(w, lane, address, sizeof values, values);
    }
}

// d = what was there; there = that + b. ORDERED (acq_rel): what the block did before its last barrier is seen by
// whoever comes here later, and by their blocks after a barrier of theirs.
template <class T, bool ORDERED>
void atomic_add(Warp& w, const Instruction& i, uint32_t lanes) {
  Block& block = *w.block;
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      const uint64_t address = address_of(w, i, 1, lane);
      Region* region;
      uint64_t at;
      uint8_t* place = global_bytes(w, lane, address, sizeof(T), region, at);
      T value;
      std::memcpy(&value, place, sizeof value);
      set_any_register(w, i.o[0], lane, value);
      value = static_cast<T>(value + static_cast<T>(any_register(w, i.o[3], lane)));
      std::memcpy(place, &value, sizeof value);
      if (ORDERED) {
        View& there = block.launch->released[address];
        add_view(there, block.view);
        add_view(there, {{block.number, block.released}});
        add_view(block.acquired[w.thread(lane)], there);
      }
    }
}

void await_previous(Warp& w, const Instruction&, uint32_t lanes) { w.waited |= lanes; }

void nothing(Warp&, const Instruction&, uint32_t) {}

template <class T>
void load_parameter(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& block = w.block->launch->parameters;
  const auto at = static_cast<uint64_t>(i.o[1]);
  T value;
  if (at + sizeof value > block.size()) fail("a parameter beyond those of the kernel");
  std::memcpy(&value, block.data() + at, sizeof value);
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) set_any_register(w, i.o[0], lane, static_cast<uint64_t>(static_cast<int64_t>(value)));
}

// cp.async: size bytes, of which the last operand says how many come from global memory; the rest is zero. They arrive
// at the wait. Signature: address, address, number, register.
void copy(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto size = static_cast<uint32_t>(i.o[4]);
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      Copy copy{lane, static_cast<uint32_t>(address_of(w, i, 0, lane)), size, {}};
      const auto wanted = i.count > 5 ? static_cast<uint32_t>(any_register(w, i.o[5], lane)) : size;
      if (wanted > size) fail_lane(w, lane, "cp.async of more bytes than its size");
      if (wanted != 0 && wanted != size) fail_lane(w, lane, "cp.async of part of its size");
      if (wanted != 0) read_global(w, lane, address_of(w, i, 2, lane), size, copy.data);
      const uint8_t* old = shared_bytes(w, lane, copy.target, size);
      touch_write(w, lane, w.block->shadow, copy.target, old, nullptr, size, "shared memory", true);
      for (uint32_t k = 0; k < size; ++k)
        ++w.block->shadow.cells[copy.target + k].pending;
      w.copies.back().push_back(copy);
    }
}

void all_lanes(const Warp& w, uint32_t lanes, const char* what) {
  if (lanes != w.alive) fail(std::string{what} + " in a part of a warp");
}

void commit_copies(Warp& w, const Instruction&, uint32_t lanes) {
  all_lanes(w, lanes, "cp.async.commit_group");
  w.copies.emplace_back();
}

void finish_copies(Warp& w, size_t left) {
  while (w.copies.size() - 1 > left) {
    for (const Copy& copy : w.copies.front()) {
      std::memcpy(w.block->shared.data() + copy.target, copy.data, copy.size);
      for (uint32_t k = 0; k < copy.size; ++k) {
        auto& cell = w.block->shadow.cells[copy.target + k];
        --cell.pending;
        cell.writer = w.thread(copy.lane);
        cell.written = w.block->launch->time;
      }
    }
    w.copies.erase(w.copies.begin());
  }
}

void wait_copies(Warp& w, const Instruction& i, uint32_t lanes) {
  all_lanes(w, lanes, "cp.async.wait_group");
  finish_copies(w, static_cast<size_t>(i.o[0]));
}

void wait_all_copies(Warp& w, const Instruction&, uint32_t lanes) {
  all_lanes(w, lanes, "cp.async.wait_all");
  w.copies.emplace_back();
  finish_copies(w, 0);
}

// COUNT 8x8 matrices of 16-bit numbers between shared memory and registers, lane by lane's rows of 16 bytes.
template <int COUNT, bool TRANSPOSED, bool STORE>
void matrices(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != ALL) fail("ldmatrix or stmatrix in a part of a warp");
  const int address = STORE ? 0 : COUNT, first = STORE ? 2 : 0;
  for (int m = 0; m < COUNT; ++m) {
    uint16_t rows[8][8];
    uint32_t* r = w.reg<uint32_t>(i.o[first + m]);
    for (int row = 0; row < 8 && !STORE; ++row)
      read_shared(w, 8 * m + row, address_of(w, i, address, 8 * m + row), 16, rows[row]);
    for (int lane = 0; lane < LANES; ++lane) {
      uint16_t pair[2];
      const int a = lane / 4, b = 2 * (lane % 4);
      uint16_t& low = TRANSPOSED ? rows[b][a] : rows[a][b];
      uint16_t& high = TRANSPOSED ? rows[b + 1][a] : rows[a][b + 1];
      if (STORE) {
        std::memcpy(pair, &r[lane], 4);
        low = pair[0], high = pair[1];
      } else {
        pair[0] = low, pair[1] = high;
        std::memcpy(&r[lane], pair, 4);
      }
    }
    for (int row = 0; row < 8 && STORE; ++row)
      write_shared(w, 8 * m + row, address_of(w, i, address, 8 * m + row), 16, rows[row]);
  }
}

template <class T, int COUNT>
void add_access(Table& t, const std::string& type) {
  const std::string vector = COUNT == 1 ? "" : ".v" + std::to_string(COUNT), v(COUNT, 'v');
  t["ld.global" + vector + type] = {&load<T, COUNT, false>, v + "a"};
  t["ld.shared" + vector + type] = {&load<T, COUNT, true>, v + "a"};
  t["st.global" + vector + type] = {&store<T, COUNT, false>, "a" + v};
  t["st.shared" + vector + type] = {&store<T, COUNT, true>, "a" + v};
}

template <class T>
void add_accesses(Table& t, const std::string& type) {
  add_access<T, 1>(t, type);
  add_access<T, 2>(t, type);
  if constexpr (sizeof(T) <= 4) add_access<T, 4>(t, type);
}

template <int COUNT, bool TRANSPOSED>
void add_matrix_access(Table& t) {
  const std::string shape =
      ".sync.aligned.m8n8.x" + std::to_string(COUNT) + (TRANSPOSED ? ".trans" : "") + ".shared.b16";
  const std::string v(COUNT, 'w');
  t["ldmatrix" + shape] = {&matrices<COUNT, TRANSPOSED, false>, v + "a"};
  t["stmatrix" + shape] = {&matrices<COUNT, TRANSPOSED, true>, "a" + v};
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

uint8_t* shared_bytes(Warp& w, int lane, uint64_t address, uint64_t size) {
  auto& shared = w.block->shared;
  address &= 0xFFFFFFFFu;
  if (address + size > shared.size())
    fail_lane(
        w, lane,
        "access of " + bytes_text(size) + " at byte " + std::to_string(static_cast<int32_t>(address)) +
            " of shared memory, which has " + std::to_string(shared.size())
    );
  if (address % size != 0) fail_lane(w, lane, "access of " + bytes_text(size) + " to shared memory is misaligned");
  return shared.data() + address;
}

void read_shared(Warp& w, int lane, uint64_t address, uint64_t size, void* to, bool async) {
  const uint8_t* from = shared_bytes(w, lane, address, size);
  const uint64_t at = address & 0xFFFFFFFFu;
  for (uint64_t k = at; k < at + size; ++k)
    if (w.block->shadow.cells[k].writer == 0) fail_lane(w, lane, "reads shared memory that nobody wrote");
  touch_read(w, lane, w.block->shadow, at, size, "shared memory", async);
  std::memcpy(to, from, size);
}

void write_shared(Warp& w, int lane, uint64_t address, uint64_t size, const void* from) {
  uint8_t* to = shared_bytes(w, lane, address, size);
  touch_write(
      w, lane, w.block->shadow, address & 0xFFFFFFFFu, to, static_cast<const uint8_t*>(from), size, "shared memory"
  );
  std::memcpy(to, from, size);
}

void add_memory(Table& t) {
  add_accesses<uint8_t>(t, ".b8");
  add_accesses<uint8_t>(t, ".u8");
  add_accesses<int8_t>(t, ".s8");
  add_accesses<uint16_t>(t, ".b16");
  add_accesses<uint32_t>(t, ".b32");
  add_accesses<uint64_t>(t, ".b64");
  for (const char* type : {".b32", ".u32", ".f32"})
    t["ld.param" + std::string{type}] = {&load_parameter<uint32_t>, "vi"};
  for (const char* type : {".b64", ".u64", ".s64"})
    t["ld.param" + std::string{type}] = {&load_parameter<uint64_t>, "vi"};
  t["ld.param.s32"] = {&load_parameter<int32_t>, "vi"};
  t["ld.param.s16"] = {&load_parameter<int16_t>, "vi"};
  t["ld.param.u16"] = t["ld.param.b16"] = {&load_parameter<uint16_t>, "vi"};
  t["ld.param.s8"] = {&load_parameter<int8_t>, "vi"};
  t["ld.param.u8"] = t["ld.param.b8"] = {&load_parameter<uint8_t>, "vi"};
  t["atom.global.gpu.acq_rel.add.u32"] = {&atomic_add<uint32_t, true>, "vav"};
  t["atom.global.gpu.relaxed.add.u32"] = {&atomic_add<uint32_t, false>, "vav"};
  t["griddepcontrol.launch_dependents"] = {&nothing, ""};
  t["griddepcontrol.wait"] = {&await_previous, ""};
  t["cp.async"] = {&copy, "aaiv"};
  t["cp.async.commit_group"] = {&commit_copies, ""};
  t["cp.async.wait_group"] = {&wait_copies, "i"};
  t["cp.async.wait_all"] = {&wait_all_copies, ""};
  add_matrix_access<1, false>(t);
  add_matrix_access<2, false>(t);
  add_matrix_access<4, false>(t);
  add_matrix_access<1, true>(t);
  add_matrix_access<2, true>(t);
  add_matrix_access<4, true>(t);
}

}  // namespace ptx
