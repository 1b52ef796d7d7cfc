package forebay;

import java.io.PrintWriter;
import java.util.HashMap;
import java.util.Map;
import org.junit.internal.AssumptionViolatedException;
import org.junit.runner.Description;
import org.junit.runner.JUnitCore;
import org.junit.runner.Request;
import org.junit.runner.manipulation.Filter;
import org.junit.runner.notification.Failure;
import org.junit.runner.notification.RunListener;

/**
 * Runs the contract tests and writes a line of each case: class, method, PASS or FAIL or SKIP, milliseconds, first line of the
 * failure; tabs between. Whole traces go to a second file. Arguments: the two files, and a regular expression for class.method.
 */
public final class RunContract extends RunListener {
  private final PrintWriter lines;
  private final PrintWriter traces;
  /** Lines of a class and method so far: the cases of PathHandle come twice under one name. */
  private final Map<String, Integer> count = new HashMap<>();
  private boolean bad;
  private long started;

  private RunContract(PrintWriter lines, PrintWriter traces) {
    this.lines = lines;
    this.traces = traces;
  }

  private void line(Description of, String outcome, Throwable why) {
    String message = "";
    if (why != null) {
      // An assumption's message says nothing of its class; some messages begin with an empty line.
      String text = why instanceof AssumptionViolatedException ? String.valueOf(why.getMessage()) : String.valueOf(why);
      message = text.strip().lines().map(String::strip).filter(s -> !s.isEmpty()).findFirst().orElse("").replace('\t', ' ');
    }
    String name = of.getTestClass().getSimpleName() + "\t" + (of.getMethodName() == null ? "-" : of.getMethodName());
    int nth = count.merge(name, 1, Integer::sum);
    lines.println(name + (nth > 1 ? "#" + nth : "") + "\t" + outcome + "\t"
        + (System.nanoTime() - started) / 1_000_000 + "\t" + message);
    lines.flush();
  }

  private void bad(String outcome, Failure failure) {
    Description of = failure.getDescription();
    // A test and what clears up after it may fail both.
    if (!bad) {
      line(of, outcome, failure.getException());
    }
    bad = true;
    traces.println("=== " + of.getTestClass().getSimpleName() + "." + of.getMethodName() + " " + outcome);
    traces.println(failure.getTrace());
    traces.flush();
  }

  @Override
  public void testStarted(Description of) {
    started = System.nanoTime();
    bad = false;
  }

  @Override
  public void testFailure(Failure failure) {
    bad("FAIL", failure);
  }

  @Override
  public void testAssumptionFailure(Failure failure) {
    bad("SKIP", failure);
  }

  @Override
  public void testIgnored(Description of) {
    started = System.nanoTime();
    line(of, "SKIP", null);
  }

  @Override
  public void testFinished(Description of) {
    if (!bad) {
      line(of, "PASS", null);
    }
    // Of a whole class, what fails next may come without a start.
    bad = false;
  }

  public static void main(String[] arguments) throws Exception {
    String wanted = arguments.length > 2 ? arguments[2] : "";
    try (PrintWriter lines = new PrintWriter(arguments[0], "UTF-8"); PrintWriter traces = new PrintWriter(arguments[1], "UTF-8")) {
      JUnitCore core = new JUnitCore();
      core.addListener(new RunContract(lines, traces));
      Request all = Request.classes(ContractTests.ALL);
      core.run(wanted.isEmpty() ? all : all.filterWith(new Filter() {
        @Override
        public boolean shouldRun(Description of) {
          return of.isTest() ? (of.getTestClass().getSimpleName() + "." + of.getMethodName()).matches(wanted)
              : of.getChildren().stream().anyMatch(this::shouldRun);
        }

        @Override
        public String describe() {
          return wanted;
        }
      }));
    }
    // Hadoop leaves threads behind, and a test that ran out of time its own.
    Runtime.getRuntime().halt(0);
  }
}
