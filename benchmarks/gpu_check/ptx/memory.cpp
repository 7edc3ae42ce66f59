// Loads, stores, asynchronous copies and atomics, inside arrays and aligned.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

std::string bytes_text(uint64_t size) { return std::to_string(size) + (size == 1 ? " byte" : " bytes"); }

Region& region_of(Warp& w, int lane, uint64_t address) {
  auto& regions = w.block->launch->regions;
  if (w.block->launch->real_addresses) {  // those of arrays in this process, in their order
    const auto above = std::upper_bound(regions.begin(), regions.end(), address, [](uint64_t at, const Region& r) {
      return at < r.base;
    });
    if (above == regions.begin()) fail_lane(w, lane, "access to global memory that is no array");
    return above[-1];
  }
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

enum Space { GLOBAL, SHARED, LOCAL };

// A thread's own memory.
uint8_t* local_bytes(Warp& w, int lane, uint64_t address, uint64_t size) {
  const uint64_t own = w.local.size() / LANES;
  if (address > own || size > own - address || address % size != 0)
    fail_lane(w, lane, "access of " + bytes_text(size) + " at byte " + std::to_string(address) + " of local memory");
  return w.local.data() + static_cast<uint64_t>(lane) * own + address;
}

// ld: COUNT values of type T, extended to their registers' widths by the kind of T.
template <class T, int COUNT, Space SPACE>
void load(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      T values[COUNT];
      const uint64_t address = address_of(w, i, COUNT, lane);
      if (SPACE == SHARED)
        read_shared(w, lane, address, sizeof values, values);
      else if (SPACE == LOCAL)
        std::memcpy(values, local_bytes(w, lane, address, sizeof values), sizeof values);
      else
        read_global(w, lane, address, sizeof values, values);
      for (int k = 0; k < COUNT; ++k)
        set_any_register(w, i.o[k], lane, static_cast<uint64_t>(static_cast<int64_t>(values[k])));
    }
}

template <class T, int COUNT, Space SPACE>
void store(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      T values[COUNT];
      for (int k = 0; k < COUNT; ++k)
        values[k] = static_cast<T>(any_register(w, i.o[2 + k], lane));
      const uint64_t address = address_of(w, i, 0, lane);
      if (SPACE == SHARED)
        write_shared(w, lane, address, sizeof values, values);
      else if (SPACE == LOCAL)
        std::memcpy(local_bytes(w, lane, address, sizeof values), values, sizeof values);
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

template <class T, int COUNT>
void load_parameter(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& block = w.block->launch->parameters;
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      T values[COUNT];
      const uint64_t at = address_of(w, i, COUNT, lane);
      if (at > block.size() || sizeof values > block.size() - at) fail("a parameter beyond those of the kernel");
      std::memcpy(values, block.data() + at, sizeof values);
      for (int k = 0; k < COUNT; ++k)
        set_any_register(w, i.o[k], lane, static_cast<uint64_t>(static_cast<int64_t>(values[k])));
    }
}

// d = what was there; there = c if that is b.
void atomic_exchange_if(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) {
      Region* region;
      uint64_t at;
      uint8_t* place = global_bytes(w, lane, address_of(w, i, 1, lane), 4, region, at);
      uint32_t value;
      std::memcpy(&value, place, 4);
      set_any_register(w, i.o[0], lane, value);
      const auto wanted = static_cast<uint32_t>(any_register(w, i.o[4], lane));
      if (value == static_cast<uint32_t>(any_register(w, i.o[3], lane))) std::memcpy(place, &wanted, 4);
    }
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
  t["ld.global" + vector + type] = {&load<T, COUNT, GLOBAL>, v + "a"};
  t["ld.shared" + vector + type] = {&load<T, COUNT, SHARED>, v + "a"};
  t["ld.local" + vector + type] = {&load<T, COUNT, LOCAL>, v + "a"};
  t["st.local" + vector + type] = {&store<T, COUNT, LOCAL>, "a" + v};
  t["ld.param" + vector + type] = {&load_parameter<T, COUNT>, v + "a"};
  t["st.global" + vector + type] = {&store<T, COUNT, GLOBAL>, "a" + v};
  t["st.shared" + vector + type] = {&store<T, COUNT, SHARED>, "a" + v};
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
  add_accesses<int16_t>(t, ".s16");
  add_accesses<int32_t>(t, ".s32");
  add_accesses<uint32_t>(t, ".b32");
  add_accesses<uint64_t>(t, ".b64");
  t["atom.global.cas.b32"] = {&atomic_exchange_if, "vavv"};
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
