// What the lanes of a warp do together: shuffles, reductions, and products of matrices (mma, wgmma).
//
// Products and their sums are in double and rounded once to float32 per instruction. What a GPU does in between is not
// specified (it truncates, in blocks), so these results are compared with a tolerance.
#include <algorithm>

#include "halves.h"
#include "machine.h"

namespace ptx {
namespace {

enum Mode { BUTTERFLY, INDEX, UP, DOWN };

// d = a of another lane; b: which, c: the segment, then the lanes that take part.
// PREDICATE: a second result, whether it was another's (or its own by right).
template <Mode mode, bool PREDICATE>
void shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  const int64_t* o = i.o + PREDICATE;
  const uint32_t *a = w.reg<uint32_t>(o[1]), *b = w.reg<uint32_t>(o[2]), *c = w.reg<uint32_t>(o[3]);
  const uint32_t* members = w.reg<uint32_t>(o[4]);
  uint32_t result[LANES], inside = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if ((members[lane] & w.alive & ~lanes) != 0) fail_lane(w, lane, "shfl.sync without all of its lanes");
    const int clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, by = b[lane] & 31;
    const int last = (lane & segment) | (clamp & ~segment & 31), first = lane & segment;
    int from = lane ^ by;
    if (mode == INDEX) from = first | (by & ~segment & 31);
    if (mode == UP) from = lane - by;
    if (mode == DOWN) from = lane + by;
    const bool valid = mode == UP ? from >= last : from <= last;
    inside |= static_cast<uint32_t>(valid) << lane;
    if (!valid) from = lane;
    if (!(lanes >> from & 1)) fail_lane(w, lane, "shfl.sync from a lane that does not take part");
    result[lane] = a[from];
  }
  uint32_t* d = w.reg<uint32_t>(i.o[0]);
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) d[lane] = result[lane];
  if (PREDICATE) {
    uint32_t* p = w.reg<uint32_t>(i.o[1]);
    *p = (*p & ~lanes) | (inside & lanes);
  }
}

template <Mode mode>
void add_shuffle(Table& t, const std::string& name) {
  t["shfl.sync." + name + ".b32"] = {&shuffle<mode, false>, "wwwww"};
  t["shfl.sync." + name + ".b32.p"] = {&shuffle<mode, true>, "wpwwww"};
}

template <class T, bool LARGEST>
void reduce(Warp& w, const Instruction& i, uint32_t lanes) {
  const T* a = w.reg<T>(i.o[1]);
  const uint32_t* members = w.reg<uint32_t>(i.o[2]);
  T best = 0;
  bool any = false;
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if ((members[lane] & w.alive) != lanes) fail_lane(w, lane, "redux.sync without all of its lanes");
    best = !any ? a[lane] : LARGEST ? std::max(best, a[lane]) : std::min(best, a[lane]);
    any = true;
  }
  for (int lane = 0; lane < LANES; ++lane)
    if (lanes >> lane & 1) w.reg<T>(i.o[0])[lane] = best;
}

void warp_barrier(Warp& w, const Instruction& i, uint32_t lanes) {
  if ((*w.reg<uint32_t>(i.o[0]) & w.alive & ~lanes) != 0) fail("bar.warp.sync without all of its lanes");
  if (lanes == w.alive) w.synced = w.block->launch->time;
}

void proxy_fence(Warp& w, const Instruction&, uint32_t) { w.fenced = w.block->launch->time; }

enum Type { BFLOAT16, HALF, TF32 };

template <Type type>
constexpr int size_of = type == TF32 ? 4 : 2;

// Element k of what lies in a register or memory.
template <Type type>
double element(const void* at, int k) {
  if constexpr (type == TF32) {
    uint32_t bits;
    std::memcpy(&bits, static_cast<const uint8_t*>(at) + 4 * k, 4);
    bits &= ~0x1FFFu;  // the last 13 bits are not seen
    float x;
    std::memcpy(&x, &bits, 4);
    return static_cast<double>(x);
  } else {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const uint8_t*>(at) + 2 * k, 2);
    return static_cast<double>(type == BFLOAT16 ? from_bfloat16(bits) : from_half(bits));
  }
}

// The 16 x K operand of a warp from four registers: rows lane / 4 and 8 below, two runs of columns.
template <Type type>
void fragment_a(Warp& w, const int64_t* registers, double* a) {
  constexpr int pack = 4 / size_of<type>, k = 8 * pack;
  for (int r = 0; r < 4; ++r) {
    const uint32_t* values = w.reg<uint32_t>(registers[r]);
    for (int lane = 0; lane < LANES; ++lane)
      for (int e = 0; e < pack; ++e)
        a[(lane / 4 + 8 * (r % 2)) * k + 4 * pack * (r / 2) + pack * (lane % 4) + e] = element<type>(&values[lane], e);
  }
}

// d[16, N] = (add ? d : 0) + a[16, K] b[K, N]; registers of d: four for every eight columns. d may be another than c.
void multiply(Warp& w, const int64_t* d, const int64_t* c, const double* a, const double* b, int n, int k) {
  std::vector<double> sum(static_cast<size_t>(n));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < n; ++column)
      sum[column] = c == nullptr
                        ? 0.0
                        : static_cast<double>(
                              w.reg<float>(c[column / 8 * 4 + row / 8 * 2 + column % 2])[row % 8 * 4 + column % 8 / 2]
                          );
    for (int j = 0; j < k; ++j)
      for (int column = 0; column < n; ++column)
        sum[column] += a[row * k + j] * b[j * n + column];
    for (int column = 0; column < n; ++column)
      w.reg<float>(d[column / 8 * 4 + row / 8 * 2 + column % 2])[row % 8 * 4 + column % 8 / 2] =
          static_cast<float>(sum[column]);
  }
}

// mma.sync m16n8: d (4), a (4), b (2), c (4).
template <Type type>
void mma(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != ALL) fail("mma in a part of a warp");
  constexpr int pack = 4 / size_of<type>, k = 8 * pack;
  double a[16 * k], b[k * 8];
  fragment_a<type>(w, i.o + 4, a);
  for (int r = 0; r < 2; ++r) {
    const uint32_t* values = w.reg<uint32_t>(i.o[8 + r]);
    for (int lane = 0; lane < LANES; ++lane)
      for (int e = 0; e < pack; ++e)
        b[(4 * pack * r + pack * (lane % 4) + e) * 8 + lane / 4] = element<type>(&values[lane], e);
  }
  multiply(w, i.o, i.o + 10, a, b, 8, k);
}

// A matrix in shared memory as wgmma sees it through a descriptor.
struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;  // bytes of a row: 16 (none), 32, 64 or 128

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4), leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4) {
    constexpr int rows[4] = {16, 128, 64, 32};
    swizzle = rows[bits >> 62];
    if ((bits >> 49 & 7) != 0) fail("a wgmma descriptor with a base offset");
  }

  // Address of the 16 bytes that hold byte `along` of row `row`; contiguous: bytes run along the rows of the operand
  // (K-major), else across (MN-major), and `row` counts k.
  uint32_t at(uint32_t row, uint32_t along, bool k_major) const {
    const auto width = static_cast<uint32_t>(swizzle);
    uint32_t address = start + row % 8 * width + along % width;
    if (width == 16 && !k_major)
      address += along / 16 * stride + row / 8 * leading;
    else
      address += row / 8 * stride + along / width * leading;
    if (width > 16) address ^= (address >> 7 & (width / 16 - 1)) << 4;
    return address;
  }
};

// count rows of `bytes` bytes through a descriptor; the lanes take turns in reading 16 bytes.
void gather(Warp& w, uint64_t descriptor, uint32_t first, uint32_t count, uint32_t bytes, bool k_major, uint8_t* to) {
  const Descriptor matrix(descriptor);
  int lane = 0;
  for (uint32_t row = 0; row < count; ++row)
    for (uint32_t along = 0; along < bytes; along += 16, lane = (lane + 1) % LANES)
      read_shared(w, lane, matrix.at(first + row, along, k_major), 16, to + row * bytes + along, true);
}

// wgmma.mma_async of N columns, for the 16 of its 64 rows that are this warp's. It is done at the wait: until then
// neither memory nor registers may change. Operands: d, a (4 registers or a descriptor), b, whether to add, the signs,
// and for half-width types whether a and b are transposed.
template <Type type, int N, bool REGISTERS>
void product(Warp& w, const MatrixStep& step) {
  constexpr int pack = 4 / size_of<type>, k = 8 * pack, size = size_of<type>, outputs = N / 2;
  const Instruction& i = *step.instruction;
  const int64_t* rest = i.o + outputs + (REGISTERS ? 4 : 1);
  if (rest[2] != 1 || rest[3] != 1) fail("a wgmma with a negated operand");
  double a[16 * k];
  std::vector<double> b(static_cast<size_t>(k * N));
  std::vector<uint8_t> bytes(static_cast<size_t>(std::max(N, 64) * k * size));
  const bool transposed_a = type != TF32 && !REGISTERS && rest[4] != 0;
  const bool transposed_b = type != TF32 && rest[REGISTERS ? 4 : 5] != 0;
  const uint32_t row = 16 * (w.number % 4);
  if (REGISTERS) {
    fragment_a<type>(w, i.o + outputs, a);
  } else if (transposed_a) {
    gather(w, step.a, 0, k, 64 * size, false, bytes.data());
    for (int r = 0; r < 16; ++r)
      for (int j = 0; j < k; ++j)
        a[r * k + j] = element<type>(bytes.data(), j * 64 + row + r);
  } else {
    gather(w, step.a, row, 16, k * size, true, bytes.data());
    for (int r = 0; r < 16 * k; ++r)
      a[r] = element<type>(bytes.data(), r);
  }
  if (transposed_b) {
    gather(w, step.b, 0, k, N * size, false, bytes.data());
    for (int j = 0; j < k * N; ++j)
      b[j] = element<type>(bytes.data(), j);
  } else {
    gather(w, step.b, 0, N, k * size, true, bytes.data());
    for (int n = 0; n < N; ++n)
      for (int j = 0; j < k; ++j)
        b[j * N + n] = element<type>(bytes.data(), n * k + j);
  }
  multiply(w, i.o, step.add ? i.o : nullptr, a, b.data(), N, k);
}

template <Type type, int N, bool REGISTERS>
void issue(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != ALL) fail("wgmma in a part of a warp");
  if (w.block->warps.size() % 4 != 0) fail("wgmma in a block that is not made of groups of four warps");
  const int64_t* rest = i.o + N / 2 + (REGISTERS ? 4 : 1);
  MatrixStep step{&i, 0, w.reg<uint64_t>(rest[0])[0], (*w.reg<uint32_t>(rest[1]) & 1) != 0, w.block->launch->time};
  if (!REGISTERS) step.a = w.reg<uint64_t>(i.o[N / 2])[0];
  w.products.back().push_back(step);
}

void run_product(Warp& w, const MatrixStep& step);

void commit_products(Warp& w, const Instruction&, uint32_t lanes) {
  if (lanes != ALL) fail("wgmma.commit_group in a part of a warp");
  w.products.emplace_back();
}

void wait_products(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != ALL) fail("wgmma.wait_group in a part of a warp");
  while (w.products.size() - 1 > static_cast<size_t>(i.o[0])) {
    for (const MatrixStep& step : w.products.front())
      run_product(w, step);
    w.products.erase(w.products.begin());
  }
}

void nothing(Warp&, const Instruction&, uint32_t) {}

std::map<Handler, void (*)(Warp&, const MatrixStep&)>& products() {
  static std::map<Handler, void (*)(Warp&, const MatrixStep&)> known;
  return known;
}

void run_product(Warp& w, const MatrixStep& step) { products().at(step.instruction->run)(w, step); }

template <Type type, int N>
void add_wgmma(Table& t, const std::string& types) {
  const std::string name =
      "wgmma.mma_async.sync.aligned.m64n" + std::to_string(N) + (type == TF32 ? "k8" : "k16") + ".f32" + types;
  const std::string d(N / 2, 'w');
  t[name] = {&issue<type, N, false>, d + "xxpii" + (type == TF32 ? "" : "ii")};
  t[name + ".a"] = {&issue<type, N, true>, d + "wwwwxpii" + (type == TF32 ? "" : "i")};
  products()[&issue<type, N, false>] = &product<type, N, false>;
  products()[&issue<type, N, true>] = &product<type, N, true>;
}

template <int N>
void add_wgmmas(Table& t) {
  add_wgmma<BFLOAT16, N>(t, ".bf16.bf16");
  add_wgmma<HALF, N>(t, ".f16.f16");
  add_wgmma<TF32, N>(t, ".tf32.tf32");
}

}  // namespace

void add_matrices(Table& t) {
  add_shuffle<BUTTERFLY>(t, "bfly");
  add_shuffle<INDEX>(t, "idx");
  add_shuffle<UP>(t, "up");
  add_shuffle<DOWN>(t, "down");
  t["redux.sync.max.s32"] = {&reduce<int32_t, true>, "www"};
  t["redux.sync.min.s32"] = {&reduce<int32_t, false>, "www"};
  t["redux.sync.max.u32"] = {&reduce<uint32_t, true>, "www"};
  t["redux.sync.min.u32"] = {&reduce<uint32_t, false>, "www"};
  t["bar.warp.sync"] = {&warp_barrier, "w"};
  t["fence.proxy.async.shared::cta"] = {&proxy_fence, ""};
  const std::string shape = "mma.sync.aligned.m16n8", registers = "wwwwwwwwwwwwww";
  t[shape + "k16.row.col.f32.bf16.bf16.f32"] = {&mma<BFLOAT16>, registers};
  t[shape + "k16.row.col.f32.f16.f16.f32"] = {&mma<HALF>, registers};
  t[shape + "k8.row.col.f32.tf32.tf32.f32"] = {&mma<TF32>, registers};
  add_wgmmas<16>(t);
  add_wgmmas<32>(t);
  add_wgmmas<64>(t);
  add_wgmmas<128>(t);
  t["wgmma.fence.sync.aligned"] = {&nothing, ""};
  t["wgmma.commit_group.sync.aligned"] = {&commit_products, ""};
  t["wgmma.wait_group.sync.aligned"] = {&wait_products, "i"};
}

}  // namespace ptx
