#include "pool/reaper.h"

#include "pool/membership.h"
#include "pool/reaper_impl.h"

namespace torchshm::pool {

template class BasicReaper<Arena, Space>;

}  // namespace torchshm::pool
