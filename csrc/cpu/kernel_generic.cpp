#define FASTATTN_ISA generic
#include "kernel.h"
