package forebay;

import java.nio.file.Files;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataInputStream;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;

/**
 * Figures of the stock Java client on the file system at a URI, one JSON line each; run it on Forebay and on a real HDFS in turn. Started by hdfs.sh bench.
 *
 * <p>Arguments: -D options as the shell takes them, then the folder to work in and the MiB of the large file. Every figure is the best of some passes: the
 * first ones are Java's compiler's.
 */
public final class Bench {
  private static FileSystem fs;
  private static Path dir;

  /** Processes of the server, and what they had used when the last figure was printed, in clock ticks. */
  private static final List<String> pids = new ArrayList<>();
  private static long used;

  /** `of`: what was done for the figure in all passes, calls or MiB; the servers' processor time is told by it. */
  private static void figure(String name, double value, String unit, double of) throws Exception {
    long before = used;
    used = used();
    // Linux counts 100 ticks a second.
    String cpu = pids.isEmpty() ? "" : String.format(",\"server_cpu_us_each\":%.0f", (used - before) * 10_000 / of);
    System.out.printf("{\"name\":\"%s\",\"value\":%.1f,\"unit\":\"%s\"%s}%n", name, value, unit, cpu);
  }

  private static long used() throws Exception {
    long ticks = 0;
    for (String pid : pids) {
      String stat = Files.readString(java.nio.file.Path.of("/proc/" + pid + "/stat"));
      String[] fields = stat.substring(stat.lastIndexOf(')') + 2).split(" ");
      ticks += Long.parseLong(fields[11]) + Long.parseLong(fields[12]);
    }
    return ticks;
  }

  private interface Work {
    void run(int i) throws Exception;
  }

  /** Calls per second of `count` calls by `threads`, the best of three passes. */
  private static double rate(int threads, int count, Work work) throws Exception {
    double best = 0;
    ExecutorService pool = Executors.newFixedThreadPool(threads);
    for (int pass = 0; pass < 3; pass++) {
      int of = pass;
      List<Callable<Void>> tasks = new ArrayList<>();
      for (int t = 0; t < threads; t++) {
        int first = t;
        tasks.add(() -> {
          for (int i = first; i < count; i += threads) {
            work.run(of * count + i);
          }
          return null;
        });
      }
      long began = System.nanoTime();
      for (Future<Void> f : pool.invokeAll(tasks)) {
        f.get();
      }
      best = Math.max(best, count / ((System.nanoTime() - began) / 1e9));
    }
    pool.shutdown();
    return best;
  }

  private static double read(Path file, int passes) throws Exception {
    byte[] piece = new byte[1 << 20];
    double best = 0;
    for (int pass = 0; pass < passes; pass++) {
      long began = System.nanoTime();
      long total = 0;
      try (FSDataInputStream in = fs.open(file)) {
        for (int n = in.read(piece); n >= 0; n = in.read(piece)) {
          total += n;
        }
      }
      best = Math.max(best, total / 1048576.0 / ((System.nanoTime() - began) / 1e9));
    }
    return best;
  }

  public static void main(String[] arguments) throws Exception {
    List<String> rest = new ArrayList<>(Arrays.asList(arguments));
    int mib = Integer.parseInt(rest.remove(rest.size() - 1));
    dir = new Path(rest.remove(rest.size() - 1));
    Configuration conf = new Configuration();
    for (String option : rest) {
      String[] pair = option.substring(2).split("=", 2);
      conf.set(pair[0], pair[1]);
    }
    // Processes of the server on this machine, whose processor time is told beside each figure.
    pids.addAll(Arrays.asList(conf.getTrimmedStrings("forebay.bench.pids")));
    fs = FileSystem.get(conf);
    fs.delete(dir, true);
    fs.mkdirs(dir);
    used = used();
    figure("create, 16 threads", rate(16, 400, i -> fs.create(new Path(dir, "c/" + i)).close()), "/s", 1200);
    figure("getFileInfo, 1 thread", rate(1, 3000, i -> fs.getFileStatus(new Path(dir, "c/" + i % 400))), "/s", 9000);
    figure("getFileInfo, 16 threads", rate(16, 20000, i -> fs.getFileStatus(new Path(dir, "c/" + i % 400))), "/s", 60000);
    figure("listing of 1,200", 1000 / rate(1, 20, i -> fs.listStatus(new Path(dir, "c"))), "ms", 60);
    byte[] piece = new byte[1 << 20];
    Path file = new Path(dir, "large");
    double write = 0;
    for (int pass = 0; pass < 3; pass++) {
      long began = System.nanoTime();
      try (FSDataOutputStream out = fs.create(file, true)) {
        for (int i = 0; i < mib; i++) {
          Arrays.fill(piece, (byte) (i + pass));
          out.write(piece);
        }
      }
      write = Math.max(write, mib / ((System.nanoTime() - began) / 1e9));
    }
    figure("write, 1 replica", write, "MiB/s", 3.0 * mib);
    figure("read", read(file, 5), "MiB/s", 5.0 * mib);
    fs.delete(dir, true);
    Runtime.getRuntime().halt(0);
  }
}
