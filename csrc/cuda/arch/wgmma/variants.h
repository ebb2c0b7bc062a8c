// Written by generate_wgmma.py. Every N.
#pragma once

#include "n112.h"
#include "n128.h"
#include "n144.h"
#include "n160.h"
#include "n176.h"
#include "n192.h"
#include "n256.h"
#include "n64.h"
#include "n80.h"
#include "n96.h"
