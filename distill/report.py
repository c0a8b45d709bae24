"""One HTML file of one run or several: curves, tables, and responses token by token.

python -m distill.report runs/forward
python -m distill.report runs/forward runs/reverse runs/jsd --output=comparison.html
python -m distill.report runs/on_policy --reference=runs/off_policy
"""

from pathlib import Path

from absl import flags

from distill.base.errors import printable
from distill.base.files import local_path
from distill.config import cli


def run() -> None:
    output_flag = flags.DEFINE_string(
        "output", None, "HTML file; by default report.html, in the run's folder if there is one."
    )
    reference_flag = flags.DEFINE_string(
        "reference", None, "Folder of a run to compare with, such as one on fixed data."
    )

    def main(folders: list[str]) -> None:
        if not folders:
            raise cli.UserError("pass the folder of a run, or of several to compare: runs/a runs/b")
        from distill.reporting.page import REPORT, write_report  # late: it imports JAX

        workdirs = [local_path(folder) for folder in folders]
        default = workdirs[0] / REPORT if len(workdirs) == 1 else Path(REPORT)
        output = local_path(output_flag.value) if output_flag.value else default
        try:
            reference = local_path(reference_flag.value) if reference_flag.value else None
            notes = write_report(workdirs, output, reference)
        except OSError as error:
            raise cli.UserError(
                f"cannot read the runs or write {output} ({error.strerror}: {error.filename}): "
                "pass --output=FILE in a folder that may be written to"
            ) from None
        for note in notes:
            print(printable(note))
        print(f"report: {output}")

    cli.run_with_arguments(main)


if __name__ == "__main__":
    run()
