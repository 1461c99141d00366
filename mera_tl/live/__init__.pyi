from .bench import Bench as Bench
from .bench import Choices as Choices
from .bench import open_bench as open_bench
from .effects import Panel as Panel
from .effects import panel as panel
from .notebook import explore as explore
from .page import make_app as make_app
from .page import serve as serve
