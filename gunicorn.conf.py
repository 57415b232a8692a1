"""What `gunicorn 'service:create_app()'` runs with in this folder: the settings of the environment.

Options of gunicorn's own command line go before these.
"""

import sys

from charloom.errors import OptionError
from service import logs
from service.settings import read
from service.web.server import options

try:
    settings = read()
except OptionError as error:
    sys.exit(str(error))
logs.configure(settings)
globals().update(options(settings))
