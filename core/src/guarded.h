// What is thrown becomes an error code: nothing is, across the interface.
#ifndef POMONA_GUARDED_H
#define POMONA_GUARDED_H

#include <new>

#include "pomona.h"

namespace pomona {

template <typename F>
int guarded(F&& f) noexcept {
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return POMONA_NO_MEMORY;
  } catch (...) {
    return POMONA_INTERNAL;
  }
#else
  return f();
#endif
}

}  // namespace pomona

#endif
