from .loading import describe_tasks as describe_tasks
from .loading import load_task as load_task
from .scorers import SCORERS as SCORERS
from .scorers import Scorer as Scorer
from .task import Example as Example
from .task import Splits as Splits
from .task import Task as Task
from .task import Train as Train
