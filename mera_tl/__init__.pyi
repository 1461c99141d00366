__version__: str

from .certificate.calibration import calibrate as calibrate
from .certificate.calibration import certify as certify
from .certificate.certificate import Calibration as Calibration
from .certificate.monitor import Monitor as Monitor
from .certificate.saving import load_steering as load_steering
from .certificate.terms import Terms as Terms
from .inference.activations import Activations as Activations
from .inference.activations import collect as collect
from .inference.evaluation import evaluate as evaluate
from .inference.outcomes import Outcomes as Outcomes
from .models.loading import load_model as load_model
from .models.model import Model as Model
from .probes.probe import LinearProbe as LinearProbe
from .probes.probe import fit_error_probe as fit_error_probe
from .steering.rules import Adaptive as Adaptive
from .steering.rules import Additive as Additive
from .steering.steering import Steering as Steering
from .steering.trace import explain as explain
from .tasks.task import Task as Task
from .tasks.task import load_task as load_task
