// Instructions that do the same in every lane and nothing else.
#pragma once

#include <tuple>

#include "machine.h"

namespace ptx {

template <class T>
char letter() {
  return sizeof(T) == 2 ? 'h' : sizeof(T) == 4 ? 'w' : 'x';
}

template <class F, class D, class... S>
struct Elementwise {
  template <size_t... I>
  static void apply(Warp& w, const Instruction& i, uint32_t lanes, std::index_sequence<I...>) {
    D* d = w.reg<D>(i.o[0]);
    const std::tuple<const S*...> s{w.reg<S>(i.o[I + 1])...};
    if (lanes == ALL) {
#pragma GCC ivdep
      for (int lane = 0; lane < LANES; ++lane)
        d[lane] = F{}(std::get<I>(s)[lane]...);
    } else {
      for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) d[lane] = F{}(std::get<I>(s)[lane]...);
    }
  }
  static void run(Warp& w, const Instruction& i, uint32_t lanes) {
    apply(w, i, lanes, std::index_sequence_for<S...>{});
  }
};

// A function as a type, for the templates here.
template <auto function>
struct Of {
  template <class... A>
  auto operator()(A... a) const {
    return function(a...);
  }
};

// d = f(s...), for registers of these types.
template <class D, class... S, class F>
Entry elementwise(F) {
  return {&Elementwise<F, D, S...>::run, std::string{letter<D>(), letter<S>()...}};
}

template <class F, class T>
struct Comparison {
  static void run(Warp& w, const Instruction& i, uint32_t lanes) {
    const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane)
      found |= static_cast<uint32_t>(F{}(a[lane], b[lane])) << lane;
    uint32_t* d = w.reg<uint32_t>(i.o[0]);
    *d = (*d & ~lanes) | (found & lanes);
  }
};

// A predicate, a bit per lane, of two registers.
template <class T, class F>
Entry comparison(F) {
  return {&Comparison<F, T>::run, std::string{'p', letter<T>(), letter<T>()}};
}

}  // namespace ptx
