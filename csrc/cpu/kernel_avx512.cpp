#define FASTATTN_ISA avx512
#include "kernel.h"
