from .comparing import SideEffect as SideEffect
from .comparing import compare_on_tasks as compare_on_tasks
from .harness import SteeredLM as SteeredLM
from .likelihood import Continuation as Continuation
from .likelihood import log_likelihoods as log_likelihoods
