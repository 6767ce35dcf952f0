#include "pool/tickets.h"

#include "pool/membership.h"
#include "pool/tickets_impl.h"

namespace torchshm::pool {

template class BasicTickets<Arena>;

}  // namespace torchshm::pool
