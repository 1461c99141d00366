from .loading import check as check
from .loading import default_source as default_source
from .loading import load_saes as load_saes
from .options import TrainOptions as TrainOptions
from .probes import MIN_FIRING as MIN_FIRING
from .probes import fit_latent_probe as fit_latent_probe
from .probes import reconstruction as reconstruction
from .training import train_saes as train_saes
