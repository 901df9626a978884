#include "policy_rows.cu"

namespace {
thread_local uint4 kept[14336];
}
