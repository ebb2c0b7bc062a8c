// The atomic operations that -fsanitize=thread turns into calls: the host's (a kernel has CUDA's own words for them).
// They are made with the strongest order, whichever was asked for.
#include <cstdint>

#define FASTATTN_HOOK __attribute__((visibility("hidden")))

extern "C" {

#define FASTATTN_FETCH(bits, name)                                                                                \
  FASTATTN_HOOK uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* where, uint##bits##_t value, \
                                                            int) {                                                \
    return __atomic_##name(where, value, __ATOMIC_SEQ_CST);                                                       \
  }

#define FASTATTN_ATOMIC(bits)                                                                                       \
  FASTATTN_HOOK uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* where, int) {              \
    return __atomic_load_n(where, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                 \
  FASTATTN_HOOK void __tsan_atomic##bits##_store(volatile uint##bits##_t* where, uint##bits##_t value, int) {       \
    __atomic_store_n(where, value, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                 \
  FASTATTN_HOOK uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* where, uint##bits##_t value, \
                                                              int) {                                                \
    return __atomic_exchange_n(where, value, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                                 \
  FASTATTN_HOOK int __tsan_atomic##bits##_compare_exchange_strong(                                                  \
      volatile uint##bits##_t* where, uint##bits##_t* expected, uint##bits##_t value, int, int) {                   \
    return __atomic_compare_exchange_n(where, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }                                                                                                                 \
  FASTATTN_HOOK int __tsan_atomic##bits##_compare_exchange_weak(                                                    \
      volatile uint##bits##_t* where, uint##bits##_t* expected, uint##bits##_t value, int order, int failure) {     \
    return __tsan_atomic##bits##_compare_exchange_strong(where, expected, value, order, failure);                   \
  }                                                                                                                 \
  FASTATTN_FETCH(bits, fetch_add)                                                                                   \
  FASTATTN_FETCH(bits, fetch_sub)                                                                                   \
  FASTATTN_FETCH(bits, fetch_and)                                                                                   \
  FASTATTN_FETCH(bits, fetch_or)                                                                                    \
  FASTATTN_FETCH(bits, fetch_xor)

FASTATTN_ATOMIC(8)
FASTATTN_ATOMIC(16)
FASTATTN_ATOMIC(32)
FASTATTN_ATOMIC(64)

FASTATTN_HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
FASTATTN_HOOK void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"
