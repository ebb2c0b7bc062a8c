// All the instructions: what a kernel includes.
#pragma once

#include "barrier.h"
#include "copy.h"
#include "fence.h"
#include "global.h"
#include "launch.h"
#include "matrix.h"
#include "mbarrier.h"
#include "numbers.h"
#include "registers.h"
#include "tma.h"
#include "wgmma.h"
