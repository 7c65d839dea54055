// A kernel's numbers against the reference's.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>

#include "reference.h"

namespace mmca::test {

struct Comparison {
  double worst = 0;                      // the largest error in units of its bound
  std::size_t compared = 0, faults = 0;  // elements
  std::string text;                      // of the first fault
};

// Of the elements for which wanted(b, h, i, d) holds.
template <class X, class R, class Wanted>
Comparison compare(const char* what, Tensor<X>& actual, const Bounded<R>& expected, const Wanted& wanted) {
  Comparison found;
  std::ostringstream text;
  text << what;
  if (expected.value.size() != static_cast<std::size_t>(actual.count())) {
    text << " has " << actual.count() << " elements, expected " << expected.value.size();
    return {0, 0, 1, text.str()};
  }
  std::size_t at = 0;
  actual.each([&](X element, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    const R x = static_cast<R>(element), exact = expected.value[at],
            bound = R(1.02) * expected.bound[at];  // errors below 1%, so their squares below that
    ++at;
    if (!wanted(b, h, i, d)) return;
    ++found.compared;
    const R error = x == exact ? 0 : std::abs(x - exact);  // equal infinities too
    if (!(error <= bound) && ++found.faults == 1)
      text << "[" << b << "," << h << "," << i << "," << d << "] is " << double(x) << ", expected " << double(exact)
           << " within " << double(bound);
    if (bound > 0) found.worst = std::max(found.worst, static_cast<double>(error / bound));
  });
  if (found.faults > 1) text << "; " << found.faults << " elements are out of bounds";
  if (found.faults) found.text = text.str();
  return found;
}

}  // namespace mmca::test
