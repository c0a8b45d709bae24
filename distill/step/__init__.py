"""One update of the student: its state, the loss of a microbatch, and the jitted train step."""

from distill.step.loss import TeacherInStep as TeacherInStep
from distill.step.loss import make_loss as make_loss
from distill.step.metrics import describe_load as describe_load
from distill.step.state import AveragedState as AveragedState
from distill.step.state import TrainState as TrainState
from distill.step.state import whole_params as whole_params
from distill.step.update import make_train_step as make_train_step
