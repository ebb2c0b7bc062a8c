#define FASTATTN_ISA amx
#define FASTATTN_AMX
#include "kernel.h"
