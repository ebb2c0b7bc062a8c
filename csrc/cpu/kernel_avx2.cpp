#define FASTATTN_ISA avx2
#include "kernel.h"
